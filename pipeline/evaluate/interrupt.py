"""Requests to stop: after a signal the command logs one message and exits with code 75, which asks for a requeue.

Every finished work item is already on disk, so nothing has to be saved.
"""

import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from data_prep.common.exit_codes import STOPPED
from pipeline.stop_signals import handle_stop_signals

logger = logging.getLogger(__name__)

GRACE_SECONDS = 5.0
"""After this time the process exits without cleanup. Python handles a signal only between two calls, and a rank may be
blocked in a collective that another rank has already left."""
SIGNAL_SPREAD_SECONDS = 2.0
"""Within this time the signal reaches all ranks."""
RETRY_SECONDS = 0.01
"""Python drops an exception that is raised in a destructor or in a weak reference's callback; so long after that,
another is raised."""
MESSAGE = "asked to stop: what was computed is cached, and the same command resumes from there."


class Stopped(BaseException):
    """A signal asked to stop. Work in progress is abandoned."""


def until_stopped(work: Callable[[], int]) -> int:
    """The exit code of `work`; after one of STOP_SIGNALS it is STOPPED, and the first rank logs a message."""
    unreported = threading.Lock()

    def report() -> None:
        if unreported.acquire(blocking=False) and os.environ.get("RANK", "0") == "0":
            logger.warning(MESSAGE)

    with _listening(report):
        try:
            return _wait_for_signal_on_error(work)
        except Stopped:
            report()
            return STOPPED


def _wait_for_signal_on_error(work: Callable[[], int]) -> int:
    try:
        return work()
    except RuntimeError:  # perhaps of a collective that another rank left after the signal, which then comes here too
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            time.sleep(SIGNAL_SPREAD_SECONDS)
        raise


@contextmanager
def _listening(report: Callable[[], None]) -> Iterator[None]:
    """Context in which a signal raises Stopped once; if the process still runs GRACE_SECONDS later, it exits."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stopping = False

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal stopping
        if not stopping:
            stopping = True
            raise Stopped

    def retry(unraisable: "sys.UnraisableHookArgs") -> None:
        nonlocal stopping
        if unraisable.exc_type is not Stopped:
            former_hook(unraisable)
            return
        stopping = False
        signal.setitimer(signal.ITIMER_REAL, RETRY_SECONDS)

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    former = handle_stop_signals(stop) | {signal.SIGALRM: signal.signal(signal.SIGALRM, stop)}
    former_hook, sys.unraisablehook = sys.unraisablehook, retry
    former_descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reader, report), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = former_hook
        signal.set_wakeup_fd(former_descriptor)
        for number, handler in former.items():
            signal.signal(number, handler)
        os.close(writer)
        watcher.join()
        os.close(reader)


def _watch(reader: int, report: Callable[[], None]) -> None:
    """Runs in a thread, which notices a signal while the main thread is in a call. Ends when the pipe is closed."""
    if not os.read(reader, 1):
        return
    poll = select.poll()  # select() refuses descriptors above 1023, which a process with many shards open has
    poll.register(reader, select.POLLIN)
    deadline = time.monotonic() + GRACE_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        if poll.poll(1000 * left) and not os.read(reader, 1):
            return
    report()
    os._exit(STOPPED)
