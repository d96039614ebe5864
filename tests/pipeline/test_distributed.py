"""What fails on one rank is raised on all, and marked so that it is printed once; a rank's CPUs and MIG instance."""

import gc
import importlib
import os
import re
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from pipeline import distributed
from pipeline.distributed import bind_to_close_cpus, close_cpus, describe_ranks, from_first, select_device
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
assert outcome(lambda: attempt(lambda: fail_on(None)).value(failed=False)) == ranks.rank
tried = attempt(lambda: fail_on(1, RuntimeError))
[failed] = all_reduce_max([tried.error is not None])
kind, message, everywhere = outcome(lambda: tried.value(bool(failed)))
assert (kind, everywhere) == ("ValueError", True) and "rank 1 failed" in message
assert first_message(None if ranks.rank == 0 else "of 1") == "of 1"
assert all_reduce_max([float(ranks.rank), -float(ranks.rank)]) == [1.0, 0.0]
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


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"RANK": "1"}, "RANK is 1; with 1 ranks"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2; with 2 ranks"),
        ({"WORLD_SIZE": "2"}, "RANK is not set, and WORLD_SIZE is 2"),
        ({"WORLD_SIZE": "auto"}, "WORLD_SIZE is 'auto'; it must be an integer"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "70000"}, "MASTER_PORT is 70000; it must"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}, "MASTER_ADDR is not set"),
        ({"LOCAL_RANK": "3"}, (0, 1)),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_ID": "9", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, (0, 1)),
        (
            {
                "SLURM_NTASKS": "4",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_PROCID": "1",
                "SLURM_LOCALID": "1",
                "MASTER_ADDR": "a",
                "MASTER_PORT": "29500",
            },
            (1, 2),
        ),
        ({"RANK": "0", "WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "2"}, (0, 1)),
    ],
    ids=[
        *("rank alone", "rank too large", "no rank", "not a number", "no port", "no address", "local rank"),
        *("the shell of salloc", "a step of two tasks", "torchrun in a step"),
    ],
)
def test_the_variables_of_a_launcher(
    variables: dict[str, str], expected: str | tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # recorded, so that it is restored
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=re.escape(expected)):
            describe_ranks()
    else:
        ranks = describe_ranks()
        assert (ranks.rank, ranks.count) == expected


@pytest.fixture
def pci_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that Linux has for a GPU at bus 0x3b."""
    monkeypatch.setattr(distributed, "PCI_DEVICES", tmp_path)
    (tmp_path / "0000:3b:00.0").mkdir()
    return tmp_path / "0000:3b:00.0"


@pytest.mark.parametrize(
    ("listed", "wanted", "found"),
    [
        ("0-2,8-9,11\n", 2, {1, 2, 8, 9, 11}),
        ("1-2,40\n", 2, {1, 2}),
        ("1-2\n", 3, set()),
        ("32-63\n", 1, set()),
        ("\n", 1, set()),
        (None, 1, set()),
    ],
    ids=["ranges", "within those allowed", "too few", "others were granted", "empty", "hidden"],
)
def test_close_cpus(listed: str | None, wanted: int, found: set[int], pci_device: Path) -> None:
    if listed is not None:
        (pci_device / "local_cpulist").write_text(listed)
    assert close_cpus(pci_device.name, set(range(1, 32)), wanted) == found


def test_all_threads_of_a_rank_keep_to_the_cpus_close_to_its_gpu(
    pci_device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: address)
    allowed, end = os.sched_getaffinity(0), threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        for cpus in ({min(allowed)}, allowed):  # the second restores what the first changed
            (pci_device / "local_cpulist").write_text(",".join(map(str, cpus)))
            with monkeypatch.context() as patch:
                patch.setattr(os, "sched_getaffinity", lambda _: allowed)
                bind_to_close_cpus(torch.device("cuda", 0))
            assert os.sched_getaffinity(0) == os.sched_getaffinity(thread.native_id or 0) == cpus
    finally:
        end.set()


@pytest.mark.parametrize(
    ("listed", "selected"),
    [("MIG-a,MIG-b", "MIG-b"), ("MIG-a", "MIG-a"), ("GPU-a,GPU-b", "GPU-a,GPU-b"), ("0,1", "0,1"), ("", "")],
)
def test_each_rank_of_a_node_sees_its_own_mig_instance(
    listed: str, selected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in {**ranks, "CUDA_VISIBLE_DEVICES": listed}.items():
        monkeypatch.setenv(name, value)
    describe_ranks()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == selected
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    select_device(1)  # as evaluate does
    assert os.environ["CUDA_VISIBLE_DEVICES"] == selected


@pytest.mark.parametrize(
    ("launcher", "gpus", "number", "left"),
    [(None, 1, 0, None), (None, 8, 0, None), ("5", 8, 5, "5"), ("5", 1, 0, "0")],
    ids=["one GPU, no launcher", "no launcher", "torchrun", "a task with one GPU of its own"],
)
def test_the_gpu_of_a_rank(
    launcher: str | None, gpus: int, number: int, left: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a launcher a process must not look like one of several ranks to accelerate."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_RANK", launcher or "")
    if launcher is None:
        monkeypatch.delenv("LOCAL_RANK")
    assert select_device(int(launcher or 0)) == number
    assert os.environ.get("LOCAL_RANK") == left


def test_training_selects_it_before_a_module_makes_cuda_read_the_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The module is replaced; its import asks CUDA for its devices."""
    seen = []

    class Module(ModuleType):
        def __getattr__(self, name: str) -> object:
            seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
            return lambda *_: 0

    monkeypatch.setitem(sys.modules, "pipeline.train.loop", Module("loop"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a,MIG-b")
    monkeypatch.setenv("LOCAL_RANK", "1")
    train = importlib.import_module("pipeline.__main__").train
    assert train(["--run", str(tmp_path), "--model.size", "s"]) == 0
    gc.enable()  # the loop does
    del sys.modules["pipeline.__main__"]  # or runpy warns when other tests run it
    assert set(seen) == {"MIG-b"}
