"""Optimizer state and weights in the host's memory, or on NVMe: the same curve, exact resumes, checkpoints like all
others."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from pipeline.config import ParallelConfig
from pipeline.train.engine import offload
from tests.launch import run, start
from tests.pipeline.conftest import Runner
from tests.pipeline.train.engine.test_topologies import FP32_TOLERANCE, RATE
from tests.pipeline.train.test_resume import wait_for_step

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="DeepSpeed compiles its Adam for the host, which needs g++"
)


@needs_compiler
@pytest.mark.slow  # a minute where DeepSpeed's Adam is compiled for the first time
@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, {"parallel__offload": "optimizer"}),
        (2, {"parallel__offload": "optimizer", "parallel__zero_stage": 2}),
        (2, {"parallel__offload": "parameters", "parallel__zero_stage": 3}),
        (2, {"parallel__offload": "optimizer", "parallel__pipeline_stages": 2}),
        (2, {"parallel__offload": "optimizer", "parallel__tensor_parallel": 2}),
    ],
)
def test_offloaded_is_as_one_rank_and_resumes_bit_for_bit(
    runner: Runner, ranks: int, settings: dict[str, object]
) -> None:
    common = {"optimizer__learning_rate": RATE, "batch__micro_size": 2, "schedule__decay": "constant"}
    runner.check_trains("one", 1, **common, schedule__steps=14)
    runner.check_trains("uninterrupted", ranks, **common, **settings, schedule__steps=14)
    assert runner.losses("uninterrupted") == pytest.approx(runner.losses("one"), abs=FP32_TOLERANCE)
    runner.check_trains("resumed", ranks, **common, **settings, schedule__steps=7)
    shutil.copytree(runner.folder / "resumed", runner.folder / "moved")
    runner.check_trains("resumed", ranks, **common, **settings, schedule__steps=14)
    assert runner.losses("resumed") == runner.losses("uninterrupted")
    plain = {"parallel__offload": "none", "parallel__zero_stage": 1, "parallel__pipeline_stages": 1}
    runner.check_trains("moved", 1, **common, **plain, parallel__tensor_parallel=1, schedule__steps=14)
    assert runner.losses("moved") == pytest.approx(runner.losses("uninterrupted"), abs=FP32_TOLERANCE)


def has_libaio() -> bool:
    return shutil.which("g++") is not None and any(Path("/usr/include").glob("**/libaio.h"))


@pytest.mark.slow  # minutes where DeepSpeed's reader and writer are compiled for the first time
@pytest.mark.skipif(not has_libaio(), reason="DeepSpeed reads and writes NVMe through libaio, which is not here")
@pytest.mark.parametrize("what", ["optimizer", "parameters"])
def test_on_nvme_it_is_as_one_rank_and_resumes_bit_for_bit(runner: Runner, tmp_path: Path, what: str) -> None:
    """And as in memory, bit for bit; on a model whose partitions are so large (1 MB) that DeepSpeed puts them there."""
    common = {"optimizer__learning_rate": RATE, "batch__micro_size": 2, "schedule__decay": "constant"}
    common |= {"model__layers": 4, "model__width": 128, "checkpoint__every_steps": 4, "schedule__steps": 10}
    disk = tmp_path / "nvme"
    disk.mkdir()
    in_memory = {"parallel__zero_stage": 3, "parallel__offload": what}
    on_nvme = {**in_memory, "parallel__nvme_path": disk}
    runner.check_trains("one", 1, **common)
    runner.check_trains("memory", 2, **common, **in_memory)
    runner.check_trains("uninterrupted", 2, **common, **on_nvme)
    assert runner.losses("uninterrupted") == pytest.approx(runner.losses("one"), abs=FP32_TOLERANCE)
    assert runner.losses("uninterrupted") == runner.losses("memory")
    assert list(disk.iterdir()) == []
    processes = start(2, *runner.arguments("killed", **common, **on_nvme), logs=tmp_path / "logs")
    wait_for_step(runner.folder / "killed", 6)
    assert sum(file.stat().st_size for file in disk.rglob("*") if file.is_file()) > 2_000_000
    os.killpg(processes[0].pid, signal.SIGKILL)
    for process in processes:
        process.wait()
    shutil.copytree(runner.folder / "killed", runner.folder / "moved")
    runner.check_trains("killed", 2, **common, **on_nvme)
    assert runner.losses("killed") == runner.losses("uninterrupted")
    assert list(disk.iterdir()) == []  # what the killed ranks left is gone too
    plain = {"parallel__offload": "none", "parallel__zero_stage": 1, "parallel__nvme_path": "null"}
    runner.check_trains("moved", 1, **common, **plain)
    assert runner.losses("moved") == pytest.approx(runner.losses("uninterrupted"), abs=FP32_TOLERANCE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"parallel__offload": "none", "parallel__nvme_path": "/"},
            "parallel.nvme_path is /; with parallel.offload none and parallel.zero_stage 1 it must be null",
        ),
        (
            {"parallel__zero_stage": 3, "parallel__nvme_path": "/nowhere"},
            "parallel.nvme_path is /nowhere; it must be a writable folder on a local disk of each node.",
        ),
        (
            {"parallel__zero_stage": 0},
            "parallel.zero_stage is 0; with parallel.offload optimizer it must be at least 1",
        ),
        ({"parallel__offload": "parameters"}, "parallel.zero_stage is 1; with parallel.offload parameters it must be"),
    ],
)
def test_invalid_input_is_an_error(runner: Runner, settings: dict[str, object], message: str) -> None:
    finished = runner.train("run", 1, **{"parallel__offload": "optimizer", **settings})
    assert finished.codes == [2]
    assert message in finished.output


def test_a_machine_without_compiler_is_told_so(runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    finished = run(1, *runner.arguments("run", parallel__offload="optimizer"), logs=tmp_path / "logs")
    assert finished.codes == [2]
    assert "parallel.offload is optimizer; DeepSpeed compiles its CPU Adam, and g++ is not" in finished.output
    assert not (runner.folder / "run").exists()


@needs_compiler
@pytest.mark.parametrize("folder", ["cpu_adam", "py311_cpu/cpu_adam"])
def test_a_lock_that_a_killed_process_has_left_is_named(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock, parallel = tmp_path / folder / "lock", ParallelConfig(offload="optimizer")
    lock.parent.mkdir(parents=True)
    lock.touch()
    offload.check_compilers(parallel, torch.device("cpu"))  # another process may just compile
    os.utime(lock, (0, 0))
    with pytest.raises(ValueError, match=f"^{lock} was created .* minutes ago by .* Delete the file.$"):
        offload.check_compilers(parallel, torch.device("cpu"))


@needs_compiler
def test_a_machine_without_libaio_is_told_so(runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDFLAGS", "-l_no_such_library")  # which is how a program that needs libaio fails without it
    settings = {"parallel__offload": "optimizer", "parallel__zero_stage": 3, "parallel__nvme_path": tmp_path}
    finished = run(1, *runner.arguments("run", **settings), logs=tmp_path / "logs")
    assert finished.codes == [2]
    assert f"parallel.nvme_path is {tmp_path}; DeepSpeed reads and writes it through libaio" in finished.output
    assert not (runner.folder / "run").exists()


@pytest.mark.parametrize("home", [None, "/nowhere"])
def test_nvme_on_cuda_needs_the_toolkit(home: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", home)
    monkeypatch.setattr(shutil, "which", lambda tool: tool)
    monkeypatch.setattr(offload, "has_libaio", lambda: True)
    monkeypatch.setattr(offload, "_takes_direct_writes", lambda folder: True)
    parallel = ParallelConfig(zero_stage=3, offload="optimizer", nvme_path=str(tmp_path))
    with pytest.raises(ValueError, match=r"^parallel.nvme_path is /.*CUDA toolkit.*set CUDA_HOME to its folder"):
        offload.check_compilers(parallel, torch.device("cuda"))
    offload.check_compilers(parallel, torch.device("cpu"))
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    offload.check_compilers(parallel, torch.device("cuda"))


ONE_OP = """
import subprocess
from pipeline.distributed import describe_ranks
from pipeline.train.engine import process_group
probed = []
subprocess.Popen.__init__, start = lambda *a, **k: probed.append(a[1]) or start(*a, **k), subprocess.Popen.__init__
from deepspeed.ops.op_builder import builder
builder.probe_is_compatible = lambda op: probed.append(op)
import deepspeed.ops
process_group.start_group(describe_ranks())
assert not probed, probed
assert deepspeed.ops.__compatible_ops__ == {"deepspeed_shm_comm": False}
"""


def test_no_compiler_is_tried_at_the_start(tmp_path: Path) -> None:
    finished = run(1, "-c", ONE_OP, logs=tmp_path)
    assert finished.codes == [0], finished.output
