"""Prints an error that several ranks raise once. Imports no torch: it is needed before the options are parsed."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from data_prep.common.command_line import print_error
from data_prep.common.exit_codes import Failed

E = TypeVar("E", bound=BaseException)


class RankUnreachable(Failed):
    """Another rank has ended, or can't be reached."""


REPORTED_ELSEWHERE = "reported_elsewhere"
"""Attribute of an error that another rank prints."""
QUIET_SECONDS = 2.0
"""How much later than this rank, rank 0 may come to print the error."""
LAUNCHED_QUIET_SECONDS = 120.0
"""The same under a launcher, which ends this rank when rank 0 exits: nobody waits so long."""
CONNECTING = "connecting to rank 0"
"""Name of the thread that connects to rank 0. Python can't end it while it is inside torch."""
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID")
"""Variables that torchrun and srun set."""


def reported_on_all_ranks(error: E) -> E:
    """Marks an error as raised on every rank, so that only rank 0 prints it. Returns the error."""
    setattr(error, REPORTED_ELSEWHERE, True)
    return error


def is_on_all_ranks(error: BaseException) -> bool:
    """Whether every rank raises the error."""
    return getattr(error, REPORTED_ELSEWHERE, False)


def local_rank() -> int:
    """This process's rank on its node, as set by torchrun or srun; 0 without either."""
    text = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    return int(text) if text.isdecimal() else 0


def is_launched() -> bool:
    """Whether torchrun or srun started this process."""
    return any(name in os.environ for name in LAUNCHERS)


@contextmanager
def reported_once_per_node(rank_on_node: int) -> Iterator[None]:
    """For checks that raise the same ValueError or OSError in all processes of a node: only local rank 0 prints it."""
    try:
        yield
    except (ValueError, OSError) as error:
        if rank_on_node != 0:
            reported_on_all_ranks(error)
        raise


def report_error(error: BaseException) -> None:
    """Prints the error as one sentence. Ranks other than 0 print it only if it may not have occurred on rank 0.

    A rank that does not print waits before it exits: launchers kill the other ranks when the first exits, and rank 0
    may have started later.
    """
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    if rank == "0":
        print_error(error)
    elif not is_on_all_ranks(error):
        print_error(error, f" (on rank {rank})")
    else:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which a launcher ends it
        time.sleep(LAUNCHED_QUIET_SECONDS if is_launched() else QUIET_SECONDS)
