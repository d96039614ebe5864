"""Requests of users: files that they create in the run, and signals to stop."""

import signal
import time
from pathlib import Path
from types import FrameType

STOP_FILE = "STOP"
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


CHECK_SECONDS = 1.0
"""Seconds between two checks for a file: on a network file system one may take longer than a step's flags."""


class RequestFile:
    """A file in the run by which a user asks for something."""

    def __init__(self, path: Path, checks: bool) -> None:
        """checks: False on ranks that leave the check to rank 0."""
        self._path, self._checks, self._next = path, checks, 0.0

    def found(self) -> bool:
        """Whether the file was there when last due to be checked; False between checks."""
        now = time.monotonic()
        if not self._checks or now < self._next:
            return False
        self._next = now + CHECK_SECONDS
        return self._path.exists()

    def delete(self) -> None:
        """Deletes the file, if it is there and this rank checks for it."""
        if self._checks:
            self._path.unlink(missing_ok=True)


class StopRequests:
    """Records signals (USR1, TERM, INT) and checks for the STOP file in the run; the loop asks at step boundaries.

    A second Ctrl-C interrupts at once.
    """

    def __init__(self, run: Path, checks_file: bool = True) -> None:
        """checks_file: whether this rank checks for the file."""
        self._file = RequestFile(run / STOP_FILE, checks_file)
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
