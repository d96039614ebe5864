"""Signs that a run should stop: a request from outside, or numbers that are no longer numbers."""

import signal
from math import isfinite
from pathlib import Path
from types import FrameType

from pipeline.train.engine import StepResult

STOP_FILE = "STOP"
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class StopRequests:
    """Remembers a signal (USR1, TERM, INT) or a STOP file in the run, until the loop asks at a step boundary.

    A second Ctrl-C does not wait.
    """

    def __init__(self, run: Path) -> None:
        self._file = run / STOP_FILE
        self._signalled = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signalled = True

    def pending(self) -> bool:
        """True once this process was asked to stop."""
        return self._signalled or self._file.exists()

    def honour(self) -> None:
        """Takes the STOP file away, so that the run can be started again."""
        self._file.unlink(missing_ok=True)


class Diverged(RuntimeError):
    """The loss or the gradient is not a finite number."""


def check_finite(step: int, first_image: int, images: int, result: StepResult) -> None:
    """Raises Diverged, naming the step and its pictures, before such a step can reach a checkpoint."""
    if isfinite(result.loss) and isfinite(result.grad_norm) and result.applied:
        return
    raise Diverged(
        f"step {step} is not finite: loss {result.loss}, gradient norm {result.grad_norm} (update "
        f"{'applied' if result.applied else 'not applied'}), on the pictures at positions {first_image} to "
        f"{first_image + images - 1} of the data order; checkpoints are from before it. A lower "
        f"optimizer.learning_rate, a longer warm-up or precision fp32 may pass it."
    )
