"""Requests of users: files that they create in the run, and signals to stop."""

import signal
import time
from pathlib import Path
from types import FrameType

STOP_FILE = "STOP"
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


LOOK_SECONDS = 1.0
"""Seconds between two looks for a file: on a network file system each may take longer than a step's flags."""


class RequestFile:
    """A file in the run by which a user asks for something."""

    def __init__(self, path: Path, looks: bool) -> None:
        """looks: False on ranks that leave it to another to look."""
        self._path, self._looks, self._next = path, looks, 0.0

    def found(self) -> bool:
        """Whether the file is there; False between two looks."""
        now = time.monotonic()
        if not self._looks or now < self._next:
            return False
        self._next = now + LOOK_SECONDS
        return self._path.exists()

    def delete(self) -> None:
        """Deletes the file, if it is there and this rank looks for it."""
        if self._looks:
            self._path.unlink(missing_ok=True)


class StopRequests:
    """Records signals (USR1, TERM, INT) and looks for the STOP file in the run; the loop asks at step boundaries.

    A second Ctrl-C interrupts at once.
    """

    def __init__(self, run: Path, looks: bool = True) -> None:
        """looks: whether this rank looks for the file."""
        self._file = RequestFile(run / STOP_FILE, looks)
        self._signalled = self._found = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signalled = True

    def pending(self) -> bool:
        """True if this process was asked to stop."""
        self._found = self._found or self._file.found()
        return self._signalled or self._found

    def acknowledge(self) -> None:
        """Deletes the STOP file, so that the run can be resumed."""
        self._file.delete()
