"""The learning rate as a pure function of the step: a linear warm-up, then a decay.

To add a decay, write a function here and add it to DECAYS. Its options are fields of ScheduleConfig.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi
from typing import TYPE_CHECKING, Literal

from pipeline.value_checks import require_minimums


def cosine(step: int, schedule: "ScheduleConfig") -> float:
    """Half a cosine period, to 0 at the last step."""
    progress = (step - schedule.warmup_steps) / (schedule.steps - schedule.warmup_steps)
    return 0.5 * (1 + cos(pi * progress))


def constant(step: int, schedule: "ScheduleConfig") -> float:
    """The peak learning rate until the last step."""
    return 1.0


Decay = Callable[[int, "ScheduleConfig"], float]
"""Maps a step after the warm-up to its learning rate as a fraction of the peak."""
DECAYS: dict[str, Decay] = {"cosine": cosine, "constant": constant}

if TYPE_CHECKING:
    DecayName = str
else:
    DecayName = Literal[tuple(DECAYS)]  # --help lists the names, and the parser checks them


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate schedule: a linear warm-up, then a decay."""

    steps: int = 1_000_000
    """Optimizer steps of the run."""
    warmup_steps: int = 10_009
    """Steps of linear warm-up (in the paper, one epoch of ImageNet)."""
    decay: DecayName = "cosine"
    """cosine: to zero at the last step; constant: the peak learning rate after the warm-up."""

    def __post_init__(self) -> None:
        require_minimums("schedule", self, steps=1, warmup_steps=0)
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"schedule.warmup_steps is {self.warmup_steps}; it must be below schedule.steps, {self.steps}."
            )
        if self.decay not in DECAYS:
            raise ValueError(f"schedule.decay is {self.decay!r}; it must be one of {', '.join(DECAYS)}.")


def learning_rate_at(step: int, peak: float, schedule: ScheduleConfig) -> float:
    """Learning rate of a step, counted from 1."""
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    return peak * DECAYS[schedule.decay](step, schedule)
