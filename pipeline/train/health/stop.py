"""Requests to stop: signals and the STOP file."""

import signal
from pathlib import Path
from types import FrameType

STOP_FILE = "STOP"
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class StopRequests:
    """Records signals (USR1, TERM, INT) and checks for the STOP file in the run; the loop asks at step boundaries.

    A second Ctrl-C interrupts at once.
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
        """True if this process was asked to stop."""
        return self._signalled or self._file.exists()

    def acknowledge(self) -> None:
        """Deletes the STOP file, so that the run can be resumed."""
        self._file.unlink(missing_ok=True)
