"""A limit to the time that a test's file may take, which a busy machine does not use up."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

LONGEST_WAIT = 60
"""Seconds on the clock: what waits forever ends."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in what computes for longer, by the process's own time, or waits for LONGEST_WAIT."""

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
