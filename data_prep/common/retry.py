"""Retries after errors that may be transient."""

import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def retry(
    work: Callable[[], Result],
    errors: tuple[type[Exception], ...],
    pause_after: Callable[[Exception, int], float],
) -> Result:
    """Calls `work` until it succeeds, retrying after any of `errors`, and returns its result.

    pause_after: takes (error, failures so far), returns the seconds before the next attempt, or raises to give up.
    """
    failures = 0
    while True:
        try:
            return work()
        except errors as error:
            failures += 1
            seconds = pause_after(error, failures)
        time.sleep(seconds)


def backoff(failures: int, first: float, factor: float = 2.0, longest: float = float("inf")) -> float:
    """Seconds to wait after `failures` failures: `first`, then `factor` times the last pause, up to `longest`."""
    return min(longest, first * factor ** (failures - 1))
