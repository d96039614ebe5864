"""Errors that several ranks meet are printed once. Imports no torch: it is needed before the options are parsed."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from data_prep.common.command_line import print_error

E = TypeVar("E", bound=BaseException)

REPORTED_ELSEWHERE = "reported_elsewhere"
"""Attribute of an error that another rank is sure to print."""
QUIET_SECONDS = 2.0
"""Between two ranks of one launch, of which one loads its packages more slowly."""


def reported_on_all_ranks(error: E) -> E:
    """The error, marked as one that every rank raises: rank 0 prints it for all."""
    setattr(error, REPORTED_ELSEWHERE, True)
    return error


def is_on_all_ranks(error: BaseException) -> bool:
    """Whether every rank raises the error."""
    return getattr(error, REPORTED_ELSEWHERE, False)


def local_rank() -> int:
    """This process's number on its node, as torchrun or srun gave it; 0 without either."""
    text = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    return int(text) if text.isdecimal() else 0


@contextmanager
def reported_once_per_node(rank_on_node: int) -> Iterator[None]:
    """All processes of a node meet the same ValueError or OSError in the body: only the first prints it."""
    try:
        yield
    except (ValueError, OSError) as error:
        if rank_on_node != 0:
            reported_on_all_ranks(error)
        raise


def report_error(error: BaseException) -> None:
    """Prints the error as one sentence. Another rank than 0 prints it only if rank 0 may not have met it.

    A rank that prints nothing waits a little: launchers end the others with the first that leaves.
    """
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    if rank == "0":
        print_error(error)
    elif not is_on_all_ranks(error):
        print_error(error, f" (on rank {rank})")
    else:
        time.sleep(QUIET_SECONDS)
