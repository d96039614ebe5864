"""The values of source.kind, with the module and the options of each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SourceKind:
    """One entry of the registry."""

    module: str
    """Has `open_source(config: SourceConfig) -> Source`."""
    reads: str
    """Description of its input, for --help."""
    options: tuple[str, ...] = ()
    """Fields of SourceConfig that only some kinds have, this one among them."""
    has_path: bool = True
    """True: `source.path` must be set. False: it must not be set."""


SOURCES = {
    "photographs": SourceKind(
        "data_prep.sources.photographs",
        "crops of the photographs in scikit-image and scikit-learn",
        ("train_per_class", "valid_per_class", "test_per_class", "regions", "equalized_side"),
        has_path=False,
    ),
    "image_folder": SourceKind("data_prep.sources.image_folder", "PATH/train/<class>/*, optionally valid/ and test/"),
    "cifar10": SourceKind("data_prep.sources.cifar", "the official files, as a folder or archive"),
    "cifar100": SourceKind("data_prep.sources.cifar", "the official files, as a folder or archive"),
    "stl10": SourceKind("data_prep.sources.stl10", "the official files, as a folder or archive", ("unlabelled",)),
    "imagenet": SourceKind("data_prep.sources.imagenet", "train/<wnid> and val, or the official tars"),
    "coco": SourceKind("data_prep.sources.coco", "images and instance annotations"),
    "places205": SourceKind("data_prep.sources.places205", "the folder images256 and the lists of its images"),
    "webdataset": SourceKind(
        "data_prep.sources.webdataset_tars",
        "tars of images, such as img2dataset writes",
        ("label_column", "tars_per_shard", "where"),
    ),
    "hf_dataset": SourceKind(
        "data_prep.sources.hf_datasets",
        "a hub name, a save_to_disk folder or a folder of parquet files",
        ("subset", "image_column", "label_column", "streaming", "where"),
    ),
}
"""By value of `source.kind`, in the order in which messages list them."""


def kinds_with(option: str) -> list[str]:
    """The kinds that have an option of SourceConfig; empty for an option of all kinds."""
    return [name for name, kind in SOURCES.items() if option in kind.options]
