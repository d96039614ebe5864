"""How long and in what batches the tasks that train do so: options they share, apart from all that needs torch."""

from dataclasses import dataclass
from typing import ClassVar

from pipeline.config import require_at_least, require_positive


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How long and in what batches is trained; the options that all such tasks share."""

    TASK: ClassVar[str] = ""
    """The task's name, for the sentences about its options."""

    epochs: int = 50
    """At most so many passes over the training pictures."""
    patience: int = 5
    """Stop after so many epochs without a better validation accuracy; 0 never stops early."""
    global_size: int = 128
    """Pictures of one optimizer step, over all ranks; batch_size of them go through a rank at once."""
    flip: bool = True
    """Mirror half of the training pictures."""
    reflect_crop: int = 4
    """Pad training pictures by so many pixels of their reflection and cut them to size again at random."""

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("patience", 0), ("global_size", 1), ("reflect_crop", 0)):
            require_at_least(f"{self.TASK}.{name}", getattr(self, name), least)

    def check_rates(self, rates: list[float]) -> None:
        """Raises ValueError if a list of learning rates is empty, or one is not above 0 or there twice."""
        if not rates:
            raise ValueError(f"{self.TASK}.learning_rates is []; it must be a list of numbers above 0.")
        for rate in rates:
            require_positive(f"{self.TASK}.learning_rates", rate)
        if len(set(rates)) < len(rates):
            raise ValueError(f"{self.TASK}.learning_rates is {rates}; each rate must stand there once.")

    def check_fits(self, resolution: int) -> None:
        """Raises ValueError if the reflection would be wider than a picture."""
        if self.reflect_crop >= resolution:
            raise ValueError(
                f"{self.TASK}.reflect_crop is {self.reflect_crop}; pictures of {resolution}x{resolution} have fewer "
                f"than {resolution} pixels to reflect."
            )


@dataclass(frozen=True, kw_only=True)
class WholeModelRecipe(Recipe):
    """Of the tasks that train all of a model, at one rate after the other."""

    clip_norm: float = 1.0
    """Largest norm of a gradient; 0 leaves it as it is."""
    recompute: bool = False
    """Activation checkpointing: recompute each block in the backward pass, where memory is short."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(f"{self.TASK}.clip_norm", self.clip_norm, 0)
