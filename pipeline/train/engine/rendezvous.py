"""The rendezvous: before the process group starts, the ranks wait for each other in a store, each step in Python.

torch waits for ten minutes inside one call: it prints nothing, and Python handles no signal meanwhile.
"""

import logging
import os
import platform
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import psutil
import torch.distributed as dist

from pipeline.distributed import Ranks
from pipeline.rank_errors import CONNECTING, RankUnreachable, is_launched

logger = logging.getLogger(__name__)

START_TIMEOUT = timedelta(minutes=10)
"""How long ranks wait for missing ranks."""
FIRST_MESSAGE_SECONDS, NEXT_MESSAGE_SECONDS = 5.0, 60.0
POLL_SECONDS = 0.05
CONNECT_TIMEOUT = timedelta(seconds=5)
"""For one attempt to connect to rank 0."""
NAMED_RANKS = 8
"""A message names at most so many missing ranks."""
PRESENT = "present"
"""Key of the number of ranks that are there; `<key> <rank>` is the process of a rank."""


@dataclass(frozen=True)
class Members:
    """All ranks, after the rendezvous."""

    store: dist.Store
    """A store that they share."""
    processes: list[str]
    """The process of each rank, as `this_process` writes it."""


@contextmanager
def default_interrupt() -> Iterator[None]:
    """Context in which Ctrl-C ends the process at once: Python's own handler waits until a call of torch returns."""
    former = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


def this_process() -> str:
    """This process, as other ranks may find it: its id, its machine, and its namespace of process ids."""
    return f"{os.getpid()} {platform.node()} {_namespace()}"


def has_ended(process: str) -> bool:
    """Whether a process of this machine, as `this_process` wrote it, has ended; False for those of other machines."""
    number, machine, namespace = process.split()
    if (machine, namespace) != (platform.node(), _namespace()):
        return False
    try:
        return bool(psutil.Process(int(number)).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _namespace() -> str:
    with suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return "unknown"


def wait_for_ranks(ranks: Ranks, timeout: timedelta = START_TIMEOUT) -> Members:
    """Waits until all ranks are there.

    A single rank needs neither address nor port. Several log for how many ranks they wait. Raises RankUnreachable.
    """
    if ranks.count == 1:
        return Members(dist.HashStore(), [this_process()])
    wait = _Wait(ranks, timeout)
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun has the store
    store = _serve(wait.port, timeout) if ranks.is_first and not served else _connect(wait)
    # torchrun may restart the ranks on the same store, which still has the addresses of those that ended.
    store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    try:
        store.set(f"{PRESENT} {ranks.rank}", this_process())
        present = store.add(PRESENT, 1)
        while present < ranks.count:
            wait.once(lambda: _missing(store, ranks.count) + f" at {wait.address}")
            present = store.add(PRESENT, 0)
        return Members(store, [store.get(f"{PRESENT} {rank}").decode() for rank in range(ranks.count)])
    except dist.DistError as error:
        raise RankUnreachable(
            f"rank 0, or torchrun, ended before all {ranks.count} ranks were there (at {wait.address}); its last "
            f"messages show why."
        ) from error


class _Wait:
    """Waits between two attempts, and logs what for."""

    def __init__(self, ranks: Ranks, timeout: timedelta) -> None:
        self.host, self.port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.address = f"{self.host}:{self.port}"
        self._count, self._logs = ranks.count, ranks.local_rank == 0
        self._start = time.monotonic()
        self._next, self._timeout = FIRST_MESSAGE_SECONDS, timeout.total_seconds()

    def once(self, describe: Callable[[], str]) -> None:
        """describe: what is waited for. Raises RankUnreachable after the timeout."""
        waited = time.monotonic() - self._start
        hint = f"WORLD_SIZE is {self._count}"
        if not is_launched():  # the variable may be left over
            hint += ": unset it to train on one rank"
        if waited > self._timeout:
            raise RankUnreachable(f"waited {waited / 60:.0f} minutes for {describe()}; {hint}.")
        if waited >= self._next:
            self._next += NEXT_MESSAGE_SECONDS
            if self._logs:
                logger.warning(f"waiting for {describe()}, up to {self._timeout / 60:.0f} minutes; {hint}")
        time.sleep(POLL_SECONDS)


def _missing(store: dist.Store, count: int) -> str:
    missing = [rank for rank in range(count) if not store.check([f"{PRESENT} {rank}"])]
    names = ", ".join(map(str, missing[:NAMED_RANKS])) + (", ..." if len(missing) > NAMED_RANKS else "")
    return f"{len(missing)} of {count} ranks ({names})"


def _serve(port: int, timeout: timedelta) -> dist.Store:
    """Rank 0's store, for all ranks. Raises RankUnreachable if the port is taken."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
        return dist.TCPStore("127.0.0.1", port, is_master=True, timeout=timeout, wait_for_workers=False)
    except (OSError, dist.DistError) as error:
        raise RankUnreachable(
            f"MASTER_PORT is {port}, on which rank 0 can't listen ({_reason(error)}); set it to a free port for all "
            f"ranks, or unset WORLD_SIZE to train on one rank."
        ) from error


def _connect(wait: _Wait) -> dist.Store:
    """The store that rank 0, or torchrun, serves at MASTER_ADDR and MASTER_PORT.

    In a thread: torch waits for ever for the answer of another program that listens there.
    """
    reason = "no answer"
    while True:
        attempt: Future[dist.Store] = Future()
        place = (wait.host, wait.port, attempt)
        threading.Thread(target=_try_to_connect, args=place, name=CONNECTING, daemon=True).start()
        while not attempt.done():
            wait.once(partial(_rank_0, wait.address, reason))
        failure = attempt.exception()
        if failure is None:
            return attempt.result()
        reason = _reason(failure)
        wait.once(partial(_rank_0, wait.address, reason))


def _rank_0(address: str, reason: str) -> str:
    return f"rank 0 at {address} ({reason})"


def _try_to_connect(host: str, port: int, attempt: Future[dist.Store]) -> None:
    try:
        with socket.create_connection((host, port), CONNECT_TIMEOUT.total_seconds()):
            pass
        store = dist.TCPStore(host, port, timeout=CONNECT_TIMEOUT, wait_for_workers=False)
        store.set_timeout(START_TIMEOUT)
        attempt.set_result(store)
    except Exception as error:  # of any kind: without a result, the attempt would never end
        attempt.set_exception(error)


def _reason(error: BaseException) -> str:
    """The first line of an error."""
    return (isinstance(error, OSError) and error.strerror) or str(error).partition("\n")[0].rstrip(". ")
