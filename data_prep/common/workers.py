"""Distributes tasks over worker processes, and returns the results in the order of the tasks."""

import ctypes
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, TypeVar

State = TypeVar("State")
Task = TypeVar("Task")
Result = TypeVar("Result")

PR_SET_PDEATHSIG = 1

_work: tuple[Callable[[Any, Any], Any], Any] | None = None


def worker_count(workers: int) -> int:
    """The configured number of workers; 0 means one for each core that this process may use."""
    return workers or len(os.sched_getaffinity(0))


def in_workers(
    function: Callable[[State, Task], Result], state: State, tasks: Iterable[Task], workers: int
) -> Generator[Result, None, None]:
    """Yields function(state, task) for each task, in order.

    The workers inherit `state` by fork: it is never pickled, and its memory is shared until written to.
    Tasks are taken from the iterable a few at a time. With one worker, the tasks run in this process.
    The first exception of a task ends the work and is raised here.
    """
    if workers == 1:
        for task in tasks:
            yield function(state, task)
        return
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("fork"), initializer=_init_worker, initargs=(function, state, os.getpid())
    )
    pending: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            pending.append(pool.submit(_call, task))
            if len(pending) >= 3 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise OSError("a worker process was killed, most likely for lack of memory; use fewer --workers.") from error
    finally:
        with _ignore_sigint():
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _ignore_sigint() -> Iterator[None]:
    """Ignores Ctrl-C: a second one during the shutdown of the pool would leave the workers waiting forever."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _init_worker(function: Callable[[Any, Any], Any], state: Any, parent: int) -> None:
    """Initializes a worker: stores the work, leaves Ctrl-C to the parent, and makes the worker die with the parent."""
    global _work
    _work = (function, state)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _call(task: Any) -> Any:
    assert _work is not None
    function, state = _work
    return function(state, task)
