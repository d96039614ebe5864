"""The configuration of a shard set: dataclasses, filled from a YAML file and dotted overrides."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from data_prep.shards.addresses import hide_secrets
from data_prep.sources.registry import SOURCES, kinds_with
from data_prep.sources.where import Where

DISTANCE = 10
"""The default of exclude_distance; README.md has what it finds."""
MAX_COLORS = 65_535  # tokens are uint16, and a model needs one more index for its start token


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where the images come from."""

    kind: str
    """The format of the source; the values are listed above."""
    path: str | None = None
    """Folder, archive or hub name. webdataset: a folder, or files or URLs with braces, such as
    s3://bucket/{00000..00099}.tar."""
    subset: str | None = None
    """hf_dataset: the configuration (subset) of the dataset, if it has several."""
    image_column: str | None = None
    """hf_dataset: the column of images; default: found by its type."""
    label_column: str | None = None
    """hf_dataset: the column of classes; default: found by its type or name. webdataset: the field of each image's
    .json that is its class; default: the .cls file."""
    streaming: bool = False
    """hf_dataset: stream the images, without storing a copy of the dataset."""
    unlabelled: bool = False
    """stl10: add the 100,000 unlabelled images to train."""
    where: str | None = None
    """webdataset and hf_dataset: keep the images whose record fits, such as "width >= 64 and punsafe < 0.5". The names
    are those of fields of the .json of each image (img2dataset), or of columns; see README.md."""
    tars_per_shard: int = 1
    """webdataset: number of tars whose images are mixed and written as one shard."""
    train_per_class: int = 1000
    """photographs: training crops of each photograph; `regions` says from where."""
    valid_per_class: int = 100
    """photographs: validation crops of each photograph."""
    test_per_class: int = 200
    """photographs: test crops of each photograph."""
    regions: Literal["sides", "grid"] = "sides"
    """photographs: where the crops of each split are from. sides: train from the left 70% of a photograph, valid from
    the upper half of the rest, test from the lower half. grid: from the cells of a grid of 4 x 4; in each row and
    column two cells are for train, one for valid and one for test."""
    equalized_side: int = 0
    """photographs: 0 stores crops in color; N makes them gray, N x N pixels, with equalized histograms: every crop has
    the same number of pixels of each gray, so that only their arrangement tells the classes apart. It must equal
    resolution."""

    def __post_init__(self) -> None:
        if self.kind not in SOURCES:
            raise ValueError(f"source.kind is {self.kind!r}; it must be one of {', '.join(SOURCES)}.")
        has_path = SOURCES[self.kind].has_path
        if self.path is not None and not has_path:
            raise ValueError(
                f"source.path is {self.path!r}, but source.kind {self.kind} takes its images from installed packages; "
                f"remove source.path."
            )
        if not self.path and has_path:
            raise ValueError(f"source.path is not set; source.kind {self.kind} needs a folder, archive, name or URL.")
        for name in ("train_per_class", "valid_per_class", "test_per_class", "tars_per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"source.{name} is {getattr(self, name)}; it must be at least 1.")
        if not 0 <= self.equalized_side <= 1024:
            raise ValueError(f"source.equalized_side is {self.equalized_side}; it must be between 0 and 1024.")
        for option in fields(self):
            kinds = kinds_with(option.name)
            if kinds and self.kind not in kinds and getattr(self, option.name) != option.default:
                raise ValueError(
                    f"source.{option.name} belongs to source.kind {' or '.join(kinds)}, not {self.kind}; remove it."
                )
        if self.where is not None:
            Where(self.where)  # raises ValueError


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """How many views of an image are stored, and how they are cropped."""

    train: int = 1
    """Views stored of each training image; more than one is only useful with random crops."""
    random_crop: Literal["auto", "always", "never"] = "auto"
    """The paper's random crop of training images. auto: only if the shorter side has 128 pixels or more; smaller
    images (CIFAR, STL-10) and the crops of kind photographs are not cropped again."""
    scaled_decode: bool = False
    """Decode large JPEGs at 1/2, 1/4 or 1/8 of their size, but at least twice the resolution. 17% to 40% faster;
    mean squared error of 4 against the exact area average."""

    def __post_init__(self) -> None:
        if self.train < 1:
            raise ValueError(f"views.train is {self.train}; it must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class PaletteConfig:
    """The colors that images are quantized to."""

    colors: int = 512
    """Number of colors."""
    file: str | None = None
    """A palette.npy to use, such as the pretraining set's; default: fitted to the training images."""

    def __post_init__(self) -> None:
        if not 2 <= self.colors <= MAX_COLORS:
            raise ValueError(f"palette.colors is {self.colors}; it must be between 2 and {MAX_COLORS}.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The options of a shard set. Only workers and max_skipped leave the bytes of the result unchanged."""

    source: SourceConfig
    """Where the images come from."""
    seed: int = 0
    """Seed of crops, validation split, order of images, and initial colors of the palette's fit."""
    resolution: int = 32
    """Width and height of the stored images, in pixels."""
    views: ViewsConfig = field(default_factory=ViewsConfig)
    """How many views of an image are stored, and how they are cropped."""
    palette: PaletteConfig = field(default_factory=PaletteConfig)
    """The colors that images are quantized to."""
    valid_fraction: float = 0.1
    """Share of the training images held out as `valid`, if the source has no validation split."""
    fold_valid: bool = False
    """Keep the held-out images in `train` too, as the paper does for its final models; then `valid` contains training
    images."""
    exclude: list[str] = field(default_factory=list)
    """Shard sets, whose split test counts, and folders of images: what is a near-duplicate of one of these images is
    not stored in `train`, nor in a `valid` that is held out of it."""
    exclude_distance: int = DISTANCE
    """Bits of the 64 of a perceptual hash by which a near-duplicate may differ, 0 to 64."""
    max_skipped: float = 0.01
    """Largest share of the images, and of the tars, that may be skipped because they are damaged. If more are damaged,
    the job fails."""
    workers: int = 0
    """Number of worker processes; 0: one per core."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be 0 or more.")
        if not 1 <= self.resolution <= 1024:
            raise ValueError(f"resolution is {self.resolution}; it must be between 1 and 1024.")
        if not 0 <= self.valid_fraction < 1:
            raise ValueError(f"valid_fraction is {self.valid_fraction}; it must be at least 0 and below 1.")
        if not 0 <= self.max_skipped <= 1:
            raise ValueError(f"max_skipped is {self.max_skipped}; it must be between 0 and 1.")
        if self.fold_valid and not self.valid_fraction:
            raise ValueError("fold_valid is true, but valid_fraction is 0; set valid_fraction, or remove fold_valid.")
        if not 0 <= self.exclude_distance <= 64:
            raise ValueError(
                f"exclude_distance is {self.exclude_distance}; it must be between 0 and 64, the bits of a hash."
            )
        if self.exclude_distance != DISTANCE and not self.exclude:
            raise ValueError(
                f"exclude_distance is {self.exclude_distance}, but exclude is not set; set exclude, or remove "
                f"exclude_distance."
            )
        if self.source.equalized_side not in (0, self.resolution):
            raise ValueError(
                f"source.equalized_side is {self.source.equalized_side}, but resolution is {self.resolution}; set both "
                f"to the same number of pixels, since resized crops would not have equal histograms."
            )
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}; it must be 0 (one per core) or more.")

    def to_dict(self) -> dict[str, Any]:
        """The options that change the bytes of the result, in plain types, without the secrets of a URL."""
        values = asdict(self)
        values["source"]["path"] = hide_secrets(self.source.path) if self.source.path else self.source.path
        values["exclude"] = [hide_secrets(place) for place in self.exclude]
        del values["workers"], values["max_skipped"]
        # Absent unless set: sets that were prepared before these options existed are resumed and found finished.
        for group, name in ((values, "exclude"), (values["source"], "where"), (values["source"], "equalized_side")):
            if not group[name]:
                del group[name]
        if self.source.regions == "sides":
            del values["source"]["regions"]
        if not self.exclude:
            del values["exclude_distance"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DataConfig":
        """The inverse of `to_dict`, for the configuration in a shard set's manifest."""
        parts = {"source": SourceConfig, "views": ViewsConfig, "palette": PaletteConfig}
        return cls(**values | {name: part(**values[name]) for name, part in parts.items()})
