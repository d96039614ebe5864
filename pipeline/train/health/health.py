"""Signs that a run is not well: requests to stop, numbers that are none or jump, copies that differ, slow ranks."""

from collections import deque
from collections.abc import Iterable
from math import nan, sqrt
from typing import Any

from data_prep.common.command_line import SAID_BY_OTHERS
from pipeline.config import HealthConfig
from pipeline.train.engine.base import StepResult, are_finite

STOP_FILE = "STOP"


class Diverged(RuntimeError):
    """Training can't go on: numbers that are none, or ranks that no longer train the same model. All ranks raise it."""

    def __init__(self, words: str) -> None:
        super().__init__(words)
        setattr(self, SAID_BY_OTHERS, True)


class Judge:
    """Decides which steps are applied, alike on all ranks: they see the same losses and gradient norms."""

    def __init__(self, config: HealthConfig, rows: Iterable[dict[str, Any]] = ()) -> None:
        """rows: of the last steps of metrics.jsonl, so that a resumed run decides as one that went on."""
        self._config = config
        self._window: deque[tuple[float, float]] = deque(maxlen=config.spike_window)
        self._reason: str | None = None
        self.skipped_in_a_row = 0
        self.weights_doubtful = False
        """Whether the last step's loss or gradients were no numbers: the weights may be none either."""
        for row in rows:
            self._count(row["applied"], *(nan if row[key] is None else row[key] for key in ("loss", "grad_norm")))

    def accept(self, loss: float, grad_norm: float) -> bool:
        """Whether the update of such a step is to be made."""
        if not are_finite(loss, grad_norm):
            self._reason = "not finite"
        elif self._is_spike(loss, grad_norm):
            self._reason = "a spike"
        return self._reason is None or (self._reason == "a spike" and not self._config.skip_spikes)

    def verdict(self, result: StepResult) -> str | None:
        """What was wrong with the step that `accept` was asked about last, or None."""
        reason, self._reason = self._reason, None
        self._count(result.applied, result.loss, result.grad_norm)
        return reason if result.applied else reason or "not finite"

    @property
    def exhausted(self) -> bool:
        """Whether health.max_skipped steps in a row were not applied."""
        return self.skipped_in_a_row >= self._config.max_skipped

    def _count(self, applied: bool, loss: float, grad_norm: float) -> None:
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
        self.weights_doubtful = not applied and not are_finite(loss, grad_norm)
        if applied:
            self._window.append((loss, grad_norm))

    def _is_spike(self, loss: float, grad_norm: float) -> bool:
        """Either is beyond spike_sigmas standard deviations of the window, which must be full."""
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
