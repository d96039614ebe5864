"""A limit to the CPU time of a block, independent of other processes on the machine."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

LONGEST_WAIT = 60
"""Seconds of wall-clock time after which a block that waits forever is ended."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError if the block takes more CPU time, or waits for LONGEST_WAIT."""

    def expire(signum: int, frame: object) -> None:
        raise TimeoutError(f"not done with in {seconds} s")

    before = {number: signal.signal(number, expire) for number in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.alarm(LONGEST_WAIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
