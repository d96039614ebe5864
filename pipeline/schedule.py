"""The learning rate as a pure function of the step: a linear warm-up, then a decay.

To add a decay, write a function here and add it to DECAYS. Its options are fields of ScheduleConfig.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi, sqrt
from typing import TYPE_CHECKING, Literal

from pipeline.value_checks import require_minimums


def cosine(step: int, schedule: "ScheduleConfig") -> float:
    """Half a cosine period, to 0 at the last step."""
    return 0.5 * (1 + cos(pi * _progress(step, schedule.warmup_steps, schedule.steps)))


def linear(step: int, schedule: "ScheduleConfig") -> float:
    """A straight line, to 0 at the last step."""
    return 1 - _progress(step, schedule.warmup_steps, schedule.steps)


def constant(step: int, schedule: "ScheduleConfig") -> float:
    """The peak learning rate until the last step."""
    return 1.0


def warmup_stable_decay(step: int, schedule: "ScheduleConfig") -> float:
    """The peak learning rate until `decay_steps` before the end, then down to 0 at the last step.

    The shapes of Hägele et al. 2024: 1 - p and 1 - sqrt(p), where p is the fraction of the decay that is over.
    """
    assert schedule.decay_steps is not None
    progress = _progress(step, schedule.steps - schedule.decay_steps, schedule.steps)
    return 1 - (progress if schedule.decay_shape == "linear" else sqrt(progress))


def _progress(step: int, first: int, last: int) -> float:
    """0 until step `first`, 1 at step `last`, and linear between."""
    return max(0.0, (step - first) / (last - first))


Decay = Callable[[int, "ScheduleConfig"], float]
"""Maps a step after the warm-up to its learning rate as a fraction of the peak."""
DECAYS: dict[str, Decay] = {
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
    "wsd": warmup_stable_decay,
}

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
    """cosine, linear: to zero at the last step; constant: the peak learning rate after the warm-up; wsd: constant until
    decay_steps before the last step, then to zero."""
    decay_steps: int | None = None
    """wsd: the last steps, over which the learning rate falls."""
    decay_shape: Literal["linear", "sqrt"] = "linear"
    """wsd: 1 - p or 1 - sqrt(p) of the peak, where p is the fraction of decay_steps that is over."""

    def __post_init__(self) -> None:
        require_minimums("schedule", self, steps=1, warmup_steps=0)
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"schedule.warmup_steps is {self.warmup_steps}; it must be below schedule.steps, {self.steps}."
            )
        if self.decay not in DECAYS:
            raise ValueError(f"schedule.decay is {self.decay!r}; it must be one of {', '.join(DECAYS)}.")
        self._check_decay_steps()

    def _check_decay_steps(self) -> None:
        most = self.steps - self.warmup_steps
        if self.decay == "wsd" and (self.decay_steps is None or not 1 <= self.decay_steps <= most):
            found = "null" if self.decay_steps is None else self.decay_steps
            raise ValueError(
                f"schedule.decay_steps is {found}; with schedule.decay wsd it must be from 1 to {most:,}, the steps "
                f"after the warm-up."
            )
        for key, unused in {"decay_steps": None, "decay_shape": "linear"}.items():
            if self.decay != "wsd" and getattr(self, key) != unused:
                raise ValueError(
                    f"schedule.{key} is {getattr(self, key)}; schedule.decay is {self.decay}, and only wsd uses it."
                )

    def describe_decay(self) -> str:
        """A short description of the decay."""
        if self.decay != "wsd":
            return self.decay
        return f"constant, then decay over the last {self.decay_steps:,} steps ({self.decay_shape})"


def learning_rate_at(step: int, peak: float, schedule: ScheduleConfig) -> float:
    """Learning rate of a step, counted from 1."""
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    return peak * DECAYS[schedule.decay](step, schedule)
