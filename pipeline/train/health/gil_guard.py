"""Ends a process whose Python threads no longer run.

A second process does it, because only that can also detect suspensions.

faulthandler's own timer would not do: it expires while a job is suspended, and ends the process when the job continues.
"""

import faulthandler
import os
import signal
import subprocess
import sys
from contextlib import suppress

PROGRAM = """
import os, select, signal, sys
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, signal.SIG_IGN)
guarded, seconds, silent = int(sys.argv[1]), float(sys.argv[2]), 0
while silent < seconds:
    if select.select([0], [], [], 1)[0]:
        silent = 0 if os.read(0, 4096) else sys.exit()
    if os.getppid() != guarded:
        sys.exit()
    if open(f"/proc/{guarded}/stat").read().rpartition(")")[2].split()[0] not in "Tt":
        silent += 1
os.kill(guarded, signal.SIGALRM)
"""
"""Counts seconds since the last beat, except those in which it, or the guarded process, is stopped."""


class GilGuard:
    """A process that has this one write its stacks to standard error and end (SIGALRM) if it does not beat."""

    def __init__(self, seconds: float) -> None:
        """seconds: how long this process may be silent."""
        faulthandler.register(signal.SIGALRM, all_threads=True, chain=True)  # in C; then the default: it ends
        command = [sys.executable, "-I", "-S", "-c", PROGRAM, str(os.getpid()), str(seconds)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        assert self._process.stdin is not None
        self._beats = self._process.stdin.fileno()
        os.set_blocking(self._beats, False)

    def beat(self) -> None:
        """Call it from a Python thread, every few seconds."""
        with suppress(OSError):  # it ended, or is suspended
            os.write(self._beats, b".")

    def close(self) -> None:
        """Ends the other process."""
        self._process.kill()
        self._process.wait()
