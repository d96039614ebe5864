"""The configuration of a shard set: dataclasses filled from a YAML file and dotted overrides."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from data_prep.sources.registry import SOURCES, kinds_with

MAX_COLORS = 65_535  # tokens are uint16, and a model needs one more number for its start token


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where the pictures come from."""

    kind: str
    """What the images come as; the kinds are listed above."""
    path: str | None = None
    """Folder, archive, hub name, or for webdataset tars: shards/{00000..00099}.tar, a folder, pipe:..., s3://..."""
    subset: str | None = None
    """hf_dataset: the configuration of the data set, where it has several."""
    image_column: str | None = None
    """hf_dataset: the column of pictures; found by its type when left out."""
    label_column: str | None = None
    """hf_dataset: the column of classes, found by its type when left out; webdataset: the field of a picture's
    .json that is its class, in place of its .cls."""
    streaming: bool = False
    """hf_dataset: read the pictures one after the other, without keeping a copy of the data set."""
    unlabelled: bool = False
    """stl10: add the 100,000 unlabelled pictures to train."""
    tars_per_shard: int = 1
    """webdataset: tars whose pictures are mixed and written as one shard."""
    train_per_class: int = 1000
    """photographs: windows cut for training from the left 70% of each photograph."""
    valid_per_class: int = 100
    """photographs: windows cut for validation from the upper half of the right 30% of each photograph."""
    test_per_class: int = 200
    """photographs: windows cut for testing from the lower half of the right 30% of each photograph."""

    def __post_init__(self) -> None:
        if self.kind not in SOURCES:
            raise ValueError(f"source.kind is {self.kind!r}; it must be one of {', '.join(SOURCES)}.")
        has_path = SOURCES[self.kind].has_path
        if self.path is not None and not has_path:
            raise ValueError(f"source.path is {self.path!r}; leave it out, {self.kind} come with the packages.")
        if not self.path and has_path:
            raise ValueError(f"source.path is not set; source.kind {self.kind} needs a folder, archive or name.")
        for name in ("train_per_class", "valid_per_class", "test_per_class", "tars_per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"source.{name} is {getattr(self, name)}; it must be at least 1.")
        for option in fields(self):
            kinds = kinds_with(option.name)
            if kinds and self.kind not in kinds and getattr(self, option.name) != option.default:
                raise ValueError(
                    f"source.{option.name} belongs to source.kind {' or '.join(kinds)}, not {self.kind}; leave it out."
                )


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """How many views of a picture are stored, and how they are cut."""

    train: int = 1
    """Views stored of each training picture; more than one only helps where crops are random."""
    random_crop: Literal["auto", "always", "never"] = "auto"
    """The paper's random crop of training pictures. auto: for pictures whose shorter side has 128 pixels or
    more; smaller ones (CIFAR, STL-10) and the windows of kind photographs are taken whole."""
    scaled_decode: bool = False
    """Decode large JPEGs at a half, a quarter or an eighth of their size, at least twice the resolution: a
    sixth to four tenths faster, and a mean squared error of 4 against the exact area average."""

    def __post_init__(self) -> None:
        if self.train < 1:
            raise ValueError(f"views.train is {self.train}; it must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class PaletteConfig:
    """The colours that pictures are reduced to."""

    colors: int = 512
    """Number of colours."""
    file: str | None = None
    """A palette.npy to use, such as the pretraining set's; fitted to the training pictures when left out."""

    def __post_init__(self) -> None:
        if not 2 <= self.colors <= MAX_COLORS:
            raise ValueError(f"palette.colors is {self.colors}; it must be between 2 and {MAX_COLORS}.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Everything that decides the bytes of a shard set, and some that does not: workers and max_skipped."""

    source: SourceConfig
    """Where the pictures come from."""
    seed: int = 0
    """Decides crops, the validation split, the order of pictures and the start of the palette's fit."""
    resolution: int = 32
    """Pixels a side of the stored pictures."""
    views: ViewsConfig = field(default_factory=ViewsConfig)
    """How many views of a picture are stored, and how they are cut."""
    palette: PaletteConfig = field(default_factory=PaletteConfig)
    """The colours that pictures are reduced to."""
    valid_fraction: float = 0.1
    """Part of the training pictures held out as `valid`, where the source brings no validation split."""
    fold_valid: bool = False
    """Train on the held-out pictures too, as the paper does for its final models; `valid` then measures the fit."""
    max_skipped: float = 0.01
    """Share of pictures, and of tars, that may be skipped because they are damaged; more end the job. The result
    does not depend on it."""
    workers: int = 0
    """Worker processes; 0: one per core. The result does not depend on it."""

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
            raise ValueError("fold_valid is true, but valid_fraction is 0: there is nothing to fold back.")
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}; it must be 0 (one per core) or more.")

    def to_dict(self) -> dict[str, Any]:
        """All that decides the bytes of the result, in plain types."""
        values = asdict(self)
        del values["workers"], values["max_skipped"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DataConfig":
        """The inverse of `to_dict`, for the configuration that a shard set carries."""
        parts = {"source": SourceConfig, "views": ViewsConfig, "palette": PaletteConfig}
        return cls(**values | {name: part(**values[name]) for name, part in parts.items()})
