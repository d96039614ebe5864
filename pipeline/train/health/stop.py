"""Requests of users: files that they create in the run, and signals to stop."""

import logging
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

from data_prep.common.files import read_json
from data_prep.common.logs import TIME
from pipeline.checkpoint.run_files import RECORD_FILE, launcher_start
from pipeline.stop_signals import SAME_INTERRUPT_SECONDS, handle_stop_signals

logger = logging.getLogger(__name__)

STOP_FILE = "STOP"
CHECK_SECONDS = 1.0
"""Seconds between two checks for a file: on a network file system one may take longer than a step's flags."""


CLOCK_TICK = 0.02
"""The precision in seconds, rounded up, with which Linux records the start of a process."""


def restarted_after_stop(run: Path) -> bool:
    """Whether torchrun has started this rank again (--max-restarts) after the run stopped on request.

    torchrun takes every exit code but 0 for a failure. Raises ValueError if run.json is not JSON.
    """
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or not (run / RECORD_FILE).is_file():
        return False
    record = read_json(run / RECORD_FILE)
    if not isinstance(record, dict):  # damaged: the start names it
        return False
    return record.get("status") == "stopped" and record.get("updated", "") >= launcher_start()


class StopRequested(Exception):
    """A request to stop ended work that the next start repeats."""


class RequestFile:
    """A file in the run by which a user asks for something."""

    def __init__(self, path: Path, checks: bool) -> None:
        """checks: False on ranks that leave the check to rank 0."""
        self._path, self._checks, self._next = path, checks, 0.0
        self._ignored: int | None = None

    def ignore_older(self, start: float) -> None:
        """Ignores a file that is older than the time `start`, unless it is touched again; logs its name."""
        modified = self._modified() if self._checks else None
        if modified is not None and modified < (start + CLOCK_TICK) * 1e9:
            self._ignored = modified
            when = time.strftime(TIME, time.localtime(modified / 1e9))
            logger.warning(
                f"{self._path} dates from {when}, before this start, and is ignored; delete it, or touch it again to "
                f"stop the run"
            )

    def _modified(self) -> int | None:
        """The file's time of modification in nanoseconds; None if it is not there."""
        with suppress(OSError):
            return self._path.stat().st_mtime_ns
        return None

    def found(self) -> bool:
        """Whether the file was there when last due to be checked; False between checks."""
        now = time.monotonic()
        if not self._checks or now < self._next:
            return False
        self._next = now + CHECK_SECONDS
        return self._modified() not in (None, self._ignored)

    def delete(self) -> None:
        """Deletes the file, if it is there and this rank checks for it; logs a warning if it can't be deleted."""
        if self._checks and (self._ignored is None or self._modified() != self._ignored):
            try:
                self._path.unlink(missing_ok=True)
            except OSError as error:  # a folder, or another user's
                logger.warning(f"{self._path} can't be deleted ({error.strerror}); delete it")


def process_start() -> float:
    """When this process started, in seconds since 1970; psutil's create_time may be a second off."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    running = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - running


class StopRequests:
    """Records stop signals and checks for the STOP file in the run; the loop asks for requests.

    A second Ctrl-C interrupts at once.
    """

    def __init__(self, run: Path, checks_file: bool = True) -> None:
        """checks_file: whether this rank checks for the file."""
        self._file = RequestFile(run / STOP_FILE, checks_file)
        self._file.ignore_older(process_start())
        self._found = False
        self._signalled: float | None = None
        handle_stop_signals(self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signalled is None:
            self._signalled = now
        elif number == signal.SIGINT and now - self._signalled > SAME_INTERRUPT_SECONDS:
            raise KeyboardInterrupt

    def pending(self) -> bool:
        """True if this process was asked to stop; call it in every step.

        The handlers are installed again: LLVM, with which Triton compiles, replaces them without Python's knowledge at
        its first kernel. Then SIGUSR1 would do nothing, and SIGTERM end the run without a save, as it does until the
        end of that step.
        """
        handle_stop_signals(self._remember)
        self._found = self._found or self._file.found()
        return self._signalled is not None or self._found

    def acknowledge(self) -> None:
        """Deletes the STOP file, so that the run can be resumed."""
        self._file.delete()
