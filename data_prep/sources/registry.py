"""The kinds of source: all that the rest of the package knows of a source's file."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SourceKind:
    """One line of the registry."""

    module: str
    """Has `open_source(config: SourceConfig) -> Source`."""
    reads: str
    """What it reads, for --help."""
    options: tuple[str, ...] = ()
    """Fields of SourceConfig that belong to this kind, beside `path`."""
    has_path: bool = True
    """Whether `source.path` must be set; else it must not."""


SOURCES = {
    "photographs": SourceKind(
        "data_prep.sources.photographs",
        "windows of images that scikit-image and scikit-learn bring along",
        ("train_per_class", "valid_per_class", "test_per_class"),
        has_path=False,
    ),
    "image_folder": SourceKind("data_prep.sources.image_folder", "PATH/train/<class>/*, optionally valid/ and test/"),
    "cifar10": SourceKind("data_prep.sources.cifar", "the official files, as a folder or archive"),
    "cifar100": SourceKind("data_prep.sources.cifar", "the official files, as a folder or archive"),
    "stl10": SourceKind("data_prep.sources.stl10", "the official files, as a folder or archive", ("unlabelled",)),
    "imagenet": SourceKind("data_prep.sources.imagenet", "train/<wnid> and val, or the official tars"),
    "coco": SourceKind("data_prep.sources.coco", "images and instance annotations"),
    "places205": SourceKind("data_prep.sources.places205", "images256 and its lists"),
    "webdataset": SourceKind(
        "data_prep.sources.webdataset_tars",
        "tars of images, as img2dataset writes them",
        ("label_column", "tars_per_shard"),
    ),
    "hf_dataset": SourceKind(
        "data_prep.sources.hf_datasets",
        "a hub name, a save_to_disk folder or a folder of parquet files",
        ("subset", "image_column", "label_column", "streaming"),
    ),
}
"""The choices of `source.kind`, in the order in which messages list them."""


def kinds_with(option: str) -> list[str]:
    """The kinds that an option of SourceConfig belongs to; empty for one that all take."""
    return [name for name, kind in SOURCES.items() if option in kind.options]
