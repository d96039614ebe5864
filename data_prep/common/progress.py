"""A progress bar on a terminal, log lines elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress(label: str, total: int | None = None, unit: str = "images") -> Iterator[Callable[[int], None]]:
    """Yields `advance(n)`. Bar and lines go to standard error: standard output is for results."""
    if sys.stderr.isatty() and logger.isEnabledFor(logging.INFO):
        from tqdm import tqdm

        with tqdm(total=total, desc=label, unit=f" {unit}", unit_scale=True) as bar:
            yield bar.update
        return

    started = last = time.monotonic()
    done = 0

    def line(now: float) -> None:
        of_total = "" if total is None else f" of {total:,}"
        throughput = done / max(now - started, 1e-9)
        logger.info(f"{label}: {done:,}{of_total} {unit}, {throughput:,.0f}/s")

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            line(now)

    yield advance
    line(time.monotonic())
