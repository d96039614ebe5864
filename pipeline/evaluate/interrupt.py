"""Requests to stop: a signal ends the command in a sentence, with the code that asks for a requeue.

What is finished is on disk already, item by item, so nothing has to be saved.
"""

import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from data_prep.common.exit_codes import STOPPED

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
GRACE = 5.0
"""Seconds until a process ends without tidying up: Python hears of a signal only between two calls, and a rank may wait
in one for another that has left."""
APART = 2.0
"""Seconds within which all ranks are told."""
MESSAGE = "asked to stop: what was computed is cached, and the same command resumes from there."


class Stopped(BaseException):
    """A signal asked to stop. Whoever works is left where it is."""


def until_stopped(work: Callable[[], int]) -> int:
    """What `work` returns; STOPPED, and a message of the first rank, if a signal (USR1, TERM, INT) ended it."""
    unreported = threading.Lock()

    def report() -> None:
        if unreported.acquire(blocking=False) and os.environ.get("RANK", "0") == "0":
            logger.warning(MESSAGE)

    with _listening(report):
        try:
            return _with_others(work)
        except Stopped:
            report()
            return STOPPED


def _with_others(work: Callable[[], int]) -> int:
    try:
        return work()
    except RuntimeError:  # a collective's too, that another rank left because it was told to: so will this one be
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            time.sleep(APART)
        raise


@contextmanager
def _listening(report: Callable[[], None]) -> Iterator[None]:
    """While open, the first signal raises Stopped; GRACE seconds later the process ends if it is still there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told = False

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal told
        if not told:
            told = True
            raise Stopped

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    former = {number: signal.signal(number, stop) for number in SIGNALS}
    former_descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reader, report), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(former_descriptor)
        for number, handler in former.items():
            signal.signal(number, handler)
        os.close(writer)
        watcher.join()
        os.close(reader)


def _watch(reader: int, report: Callable[[], None]) -> None:
    """Runs in a thread, which hears of a signal while the main one is in a call. Ends when the pipe is closed."""
    if not os.read(reader, 1):
        return
    last = time.monotonic() + GRACE
    while (left := last - time.monotonic()) > 0:
        if select.select([reader], [], [], left)[0] and not os.read(reader, 1):
            return
    report()
    os._exit(STOPPED)
