"""What a new run starts from: the options of section `start`."""

from dataclasses import dataclass

from pipeline.hub import HUB


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """The weights that a new run starts from. A resumed run does not read them again."""

    path: str | None = None
    """A run (its newest complete checkpoint), a checkpoint, a model folder (of this pipeline, or an ImageGPT of
    transformers), or hub:ORG/NAME[@REVISION]; null: initial weights. At another model.resolution, position embeddings
    are resampled."""
    moments: bool = False
    """Take Adam's moments and step count too; needs a checkpoint of the same model.resolution."""
    position: bool = False
    """Continue in the data order where the checkpoint was saved; needs the same shard set, seed and augmentation."""

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
    def from_hub(self) -> bool:
        """Whether the path is a name on a hub."""
        return self.path is not None and self.path.startswith(HUB)
