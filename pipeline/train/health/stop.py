"""Requests to stop: signals and the STOP file."""

import signal
from pathlib import Path
from types import FrameType

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

    def acknowledge(self) -> None:
        """Deletes the STOP file, so that the run can be started again."""
        self._file.unlink(missing_ok=True)
