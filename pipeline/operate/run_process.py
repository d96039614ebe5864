"""The process of a run that another command starts: requests to stop are passed on to it, and it saves."""

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pipeline.stop_signals import SAME_INTERRUPT_SECONDS, handle_stop_signals


class RunProcess:
    """Runs commands one after the other, and passes requests to stop on to the one that runs."""

    def __init__(self) -> None:
        self._asked: float | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def asked(self) -> bool:
        """Whether this process was asked to stop."""
        return self._asked is not None

    @contextmanager
    def forwarding(self) -> Iterator[None]:
        """Context in which a request to stop is passed on instead of ending this process."""
        former = handle_stop_signals(self._forward)
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def run(self, command: list[str]) -> int:
        """Runs a command and returns its exit code.

        It is in a process group of its own, so that a Ctrl-C of the terminal reaches it only through this process:
        torchrun ends badly if it gets a signal twice.
        """
        self._process = subprocess.Popen(command, process_group=0)
        if self.asked:  # the request came before the process was there
            self._process.send_signal(signal.SIGTERM)
        return self._process.wait()

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        """SIGTERM has a run save, under torchrun and srun too. A second Ctrl-C ends it without saving."""
        now = time.monotonic()
        if self._asked is None:
            self._asked, passed_on = now, signal.SIGTERM
        elif number == signal.SIGINT and now - self._asked > SAME_INTERRUPT_SECONDS:
            passed_on = signal.SIGINT
        else:
            return
        if self._process is not None:
            self._process.send_signal(passed_on)
