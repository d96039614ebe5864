"""Work that is tried again after what may pass."""

import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def retry(
    work: Callable[[], Result],
    errors: tuple[type[Exception], ...],
    pause_after: Callable[[Exception, int], float],
) -> Result:
    """The result of `work`, called again after any of `errors`.

    pause_after: (error, failures so far) to the seconds before the next attempt; it raises to give up.
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
    """Seconds to wait after so many failures: `first`, then `factor` times the pause before, up to `longest`."""
    return min(longest, first * factor ** (failures - 1))
