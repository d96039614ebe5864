"""Decides which steps are skipped: those with NaN or Inf in loss or gradient, and, optionally, loss spikes."""

from collections import deque
from collections.abc import Iterable
from math import nan, sqrt
from typing import Any

from pipeline.config import HealthConfig
from pipeline.train.engine.base import NOT_FINITE, StepDecision, StepResult, are_finite

SPIKE = "a spike"
"""The reason for a loss spike; a value of skipped.jsonl."""
DESCRIPTIONS = {NOT_FINITE: "NaN or Inf in loss or gradient", SPIKE: "loss spike"}
"""The reasons as they are logged."""


class StepFilter:
    """Decides which steps are applied, the same on all ranks: they have the same losses and gradient norms."""

    def __init__(self, config: HealthConfig, rows: Iterable[dict[str, Any]] = ()) -> None:
        """rows: the last steps of metrics.jsonl, so that a resumed run decides like an uninterrupted one."""
        self._config = config
        self._window: deque[tuple[float, float]] = deque(maxlen=config.spike_window)
        self.skipped_in_a_row = 0
        self.weights_may_be_nonfinite = False
        """Whether the last step's loss or gradient was NaN or Inf: the weights may be, too."""
        for row in rows:
            self._count(row["applied"], *(nan if row[key] is None else row[key] for key in ("loss", "grad_norm")))

    def accept(self, loss: float, grad_norm: float) -> StepDecision:
        """Whether to apply a step with this loss and gradient norm, and what is wrong with the step."""
        if not are_finite(loss, grad_norm):
            return StepDecision(False, NOT_FINITE)
        if self._is_spike(loss, grad_norm):
            return StepDecision(not self._config.skip_spikes, SPIKE)
        return StepDecision(True, None)

    def record(self, result: StepResult) -> None:
        """Counts a step; later steps are compared with the applied ones."""
        self._count(result.applied, result.loss, result.grad_norm)

    @property
    def exhausted(self) -> bool:
        """Whether health.max_skipped steps in a row were skipped."""
        return self.skipped_in_a_row >= self._config.max_skipped

    def _count(self, applied: bool, loss: float, grad_norm: float) -> None:
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
        self.weights_may_be_nonfinite = not applied and not are_finite(loss, grad_norm)
        if applied:
            self._window.append((loss, grad_norm))

    def _is_spike(self, loss: float, grad_norm: float) -> bool:
        """Whether either is over spike_sigmas standard deviations above the mean of the window, once it is full."""
        if not self._config.spike_sigmas or len(self._window) < self._config.spike_window:
            return False
        return any(
            value > mean + self._config.spike_sigmas * deviation
            for value, (mean, deviation) in zip(
                (loss, grad_norm), map(_mean_and_deviation, zip(*self._window, strict=True)), strict=True
            )
        )


def _mean_and_deviation(values: Iterable[float]) -> tuple[float, float]:
    numbers = list(values)
    mean = sum(numbers) / len(numbers)
    return mean, sqrt(sum((number - mean) ** 2 for number in numbers) / len(numbers))
