"""What fails on one rank is raised on all, and marked so that it is printed once."""

from pathlib import Path

import pytest

from pipeline.distributed import from_first
from pipeline.rank_errors import is_on_all_ranks
from tests.launch import run

TWO_RANKS = """
import torch, torch.distributed as dist
from io import BytesIO
from urllib.error import HTTPError
from pipeline.distributed import *
from pipeline.rank_errors import is_on_all_ranks
dist.init_process_group("gloo")
ranks = describe_ranks()

def fail_on(rank, error=ValueError):
    if ranks.rank == rank:
        raise error(f"rank {rank} failed")
    return ranks.rank

def outcome(work):
    try:
        return work()
    except (ValueError, OSError) as error:
        return type(error).__name__, str(error), is_on_all_ranks(error)

class Unpicklable(ValueError):
    def __init__(self, file, place):
        super().__init__(f"{file}: damaged at {place}")
        self.file = open(file)

def damaged():
    raise Unpicklable("/dev/null", 3)

def not_found():
    raise HTTPError("http://hub/model", 404, "Not Found", {}, BytesIO())

def missing():
    open("/nowhere/shards.json")

def guarded(rank):
    with raise_on_all_ranks():
        fail_on(rank)

assert from_first(lambda: f"of {ranks.rank}") == "of 0"
assert outcome(lambda: from_first(lambda: fail_on(1))) == 0
assert outcome(lambda: from_first(lambda: fail_on(0, OSError))) == ("OSError", "rank 0 failed", True)
assert outcome(lambda: from_first(damaged))[1:] == ("/dev/null: damaged at 3", True)
assert outcome(lambda: from_first(not_found))[1:] == ("HTTP Error 404: Not Found", True)
expected = "FileNotFoundError", "[Errno 2] No such file or directory: '/nowhere/shards.json'", True
assert outcome(lambda: from_first(missing)) == expected
assert outcome(lambda: guarded(1)) == ("ValueError", "rank 1 failed", True)
assert outcome(lambda: guarded(None)) is None
assert outcome(lambda: run_on_all_ranks(lambda: fail_on(None), ranks)) == ranks.rank
kind, message, everywhere = outcome(lambda: run_on_all_ranks(lambda: fail_on(1, RuntimeError), ranks))
assert (kind, everywhere) == ("ValueError", True) and "rank 1 failed" in message
assert first_message(None if ranks.rank == 0 else "of 1") == "of 1"
assert all_reduce_max([float(ranks.rank), -float(ranks.rank)], ranks.device) == [1.0, 0.0]
"""


def test_two_ranks_agree(tmp_path: Path) -> None:
    finished = run(2, "-c", TWO_RANKS, logs=tmp_path)
    assert finished.codes == [0, 0], finished.outputs


def test_without_a_group_this_rank_is_the_first() -> None:
    assert from_first(lambda: 3) == 3

    def fail() -> None:
        raise OSError("no such disk")

    with pytest.raises(OSError, match="no such disk") as raised:
        from_first(fail)
    assert is_on_all_ranks(raised.value)
