"""What a new run starts from: the options of section `start`."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.hub import HUB


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """The weights that a new run starts from. A resumed run does not read them again."""

    path: str | None = None
    """A run (its newest complete checkpoint), a checkpoint, a model folder (of this pipeline, or an ImageGPT of
    transformers), or hub:ORG/NAME[@REVISION]; null: initial weights. At another model.resolution, position embeddings
    are resampled. Of a run or checkpoint the raw weights are taken; to start from its average (ema), export it first:
    `pipeline export --weights ema`."""
    moments: bool = False
    """Take Adam's moments and step count too; needs a checkpoint of the same model.resolution. If both runs have
    ema.decay, the average of the weights is taken too."""
    position: bool = False
    """Continue in the data order where the checkpoint was saved; needs the same seed and augmentation, and
    the same shard set, or a mixture that has one of its sets."""

    def __post_init__(self) -> None:
        for key in ("moments", "position"):
            if not getattr(self, key):
                continue
            if self.path is None:
                raise ValueError(f"start.{key} is true, but start.path is null; give a run or a checkpoint.")
            if self.from_hub:
                raise ValueError(
                    f"start.{key} is true, but start.path is {self.path}, and a model on a hub has weights only; give "
                    f"a run or a checkpoint, or set start.{key} to false."
                )

    @property
    def resolved_path(self) -> str | None:
        """The path as config.yaml has it: absolute, so that a start from another directory reads the same folder."""
        return self.path if self.path is None or self.from_hub else str(Path(self.path).resolve())

    @property
    def from_hub(self) -> bool:
        """Whether the path is a name on a hub."""
        return self.path is not None and self.path.startswith(HUB)
