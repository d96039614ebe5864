"""The configuration of a shard set: dataclasses filled from a YAML file and dotted overrides."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

MAX_COLORS = 65_535  # tokens are uint16, and a model needs one more number for its start token


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where the pictures come from."""

    kind: Literal["photographs", "image_folder", "cifar10", "cifar100", "hf_dataset"]
    """photographs: windows of pictures that scikit-image and scikit-learn bring along; image_folder:
    PATH/train/<class>/*, optionally valid/ and test/; cifar10, cifar100: the official python or binary
    files, as a folder or archive; hf_dataset: a hub name, a save_to_disk folder or a folder of parquet files."""
    path: str | None = None
    """Folder, archive or hub name."""
    subset: str | None = None
    """hf_dataset: the configuration of the data set, where it has several."""
    image_column: str | None = None
    """hf_dataset: the column of pictures; found by its type when left out."""
    label_column: str | None = None
    """hf_dataset: the column of classes; found by its type when left out."""
    streaming: bool = False
    """hf_dataset: read the pictures one after the other, without keeping a copy of the data set."""
    train_per_class: int = 1000
    """photographs: windows cut for training from the left 70% of each photograph."""
    test_per_class: int = 200
    """photographs: windows cut for testing from the right 30% of each photograph."""

    def __post_init__(self) -> None:
        if self.kind == "photographs" and self.path is not None:
            raise ValueError(f"source.path is {self.path!r}; leave it out, photographs come with the packages.")
        if self.kind != "photographs" and not self.path:
            raise ValueError(f"source.path is not set; source.kind {self.kind} needs a folder, archive or name.")
        if self.kind != "hf_dataset":
            for name in ("subset", "image_column", "label_column", "streaming"):
                if getattr(self, name):
                    raise ValueError(f"source.{name} belongs to source.kind hf_dataset, not {self.kind}; leave it out.")
        for name in ("train_per_class", "test_per_class"):
            if getattr(self, name) < 1:
                raise ValueError(f"source.{name} is {getattr(self, name)}; it must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """How many views of a picture are stored, and how they are cut."""

    train: int = 1
    """Views stored of each training picture; more than one only helps where crops are random."""
    random_crop: Literal["auto", "always", "never"] = "auto"
    """The paper's random crop of training pictures. auto: for pictures whose shorter side has 128 pixels or
    more; smaller ones (CIFAR, STL-10) and the windows of kind photographs are taken whole."""

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
    """Everything that decides the bytes of a shard set, and the number of workers, which does not."""

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
    workers: int = 0
    """Worker processes; 0: one per core. The result does not depend on it."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be 0 or more.")
        if not 1 <= self.resolution <= 1024:
            raise ValueError(f"resolution is {self.resolution}; it must be between 1 and 1024.")
        if not 0 <= self.valid_fraction < 1:
            raise ValueError(f"valid_fraction is {self.valid_fraction}; it must be at least 0 and below 1.")
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}; it must be 0 (one per core) or more.")

    def to_dict(self) -> dict[str, Any]:
        """All that decides the bytes of the result, in plain types: everything but the number of workers."""
        values = asdict(self)
        del values["workers"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DataConfig":
        """The inverse of `to_dict`, for the configuration that a shard set carries."""
        parts = {"source": SourceConfig, "views": ViewsConfig, "palette": PaletteConfig}
        return cls(**values | {name: part(**values[name]) for name, part in parts.items()})
