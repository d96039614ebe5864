"""Tensor parallelism: the same curve as plain torch, the same samples, exact resumes."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from pipeline.train.engine import tensor_dropout
from tests.launch import start
from tests.pipeline.conftest import Runner
from tests.pipeline.train.engine.test_topologies import BF16_TOLERANCE, FP32_TOLERANCE, RATE, train_plainly
from tests.pipeline.train.test_resume import wait_for_step

COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on CPU needs g++")
TP2 = {"parallel__tensor_parallel": 2, "batch__micro_size": 2}


@pytest.fixture(scope="module")
def plain_losses(shards: Path) -> list[float]:
    return train_plainly(shards)


@pytest.mark.parametrize(
    ("ranks", "stage", "recompute"), [(2, 1, True), pytest.param(4, 2, False, marks=pytest.mark.slow)]
)
def test_fp32_losses_are_those_of_plain_torch(
    runner: Runner, plain_losses: list[float], ranks: int, stage: int, recompute: bool
) -> None:
    settings = {**TP2, "parallel__zero_stage": stage, "parallel__recompute": recompute}
    runner.check_trains("run", ranks, **settings, optimizer__learning_rate=RATE)
    assert runner.losses("run") == pytest.approx(plain_losses, abs=FP32_TOLERANCE)


@pytest.mark.slow
def test_bf16_losses_stay_near(runner: Runner, plain_losses: list[float]) -> None:
    runner.check_trains("run", 2, **TP2, optimizer__learning_rate=RATE, precision="bf16")
    assert runner.losses("run") == pytest.approx(plain_losses, abs=BF16_TOLERANCE)


@pytest.mark.parametrize("block", [pytest.param("igpt", marks=pytest.mark.slow), "gpt2"])
def test_two_parts_are_as_one_rank(runner: Runner, block: str) -> None:
    """Losses, norms, validation and the drawn completions."""
    common = {"model__block": block, "schedule__steps": 10, "samples__every_steps": 10, "validation__images": 13}
    common |= {"optimizer__learning_rate": RATE, "batch__micro_size": 2}
    runner.check_trains("one", 1, **common)
    runner.check_trains("two", 2, **common, parallel__tensor_parallel=2)
    assert runner.losses("two") == pytest.approx(runner.losses("one"), abs=FP32_TOLERANCE)
    for key, tolerance in (("grad_norm", {"rel": 1e-4}), ("valid_loss", {"abs": FP32_TOLERANCE})):
        one, two = ([row[key] for row in runner.rows(name) if key in row] for name in ("one", "two"))
        assert one
        assert two == pytest.approx(one, **tolerance)
    drawn = [(runner.folder / name / "samples/step-00000010.png").read_bytes() for name in ("one", "two")]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("sequence", "compiled"),
    [
        (False, False),
        pytest.param(True, False, marks=pytest.mark.slow),
        pytest.param(False, True, marks=[pytest.mark.slow, COMPILER]),
        pytest.param(True, True, marks=[pytest.mark.slow, COMPILER]),
    ],
)
def test_with_dropout_a_resumed_run_is_bit_equal(runner: Runner, sequence: bool, compiled: bool) -> None:
    """The health check compares the replicas: without equal masks outside the split matrices they would differ."""
    settings = {**TP2, "parallel__sequence_parallel": sequence, "schedule__decay": "constant", "compile": compiled}
    settings |= {"model__dropout": 0.1, "optimizer__learning_rate": RATE, "checkpoint__every_steps": 4}
    settings |= {"validation__every_steps": 4}
    runner.check_trains("unbroken", 2, **settings, schedule__steps=12)
    first = runner.train("run", 2, **settings, schedule__steps=8)
    assert first.codes == [0, 0], first.output
    assert ("with parallel.sequence_parallel it is compiled" in first.output) is (compiled and not sequence)
    runner.check_trains("run", 2, **settings, schedule__steps=12)
    assert runner.losses("run") == runner.losses("unbroken")


def test_a_rank_drops_by_its_own_stream_inside_and_by_the_common_one_outside() -> None:
    inside, outside = [], []
    for rank in (0, 1, 0):
        torch.manual_seed(7)
        with tensor_dropout._own_stream(torch.device("cpu"), rank):
            inside.append(torch.rand(4).tolist())
        outside.append(torch.rand(4).tolist())
    assert inside[0] == inside[2] != inside[1]
    assert outside[0] == outside[1] == outside[2] != inside[0]


@pytest.mark.slow
def test_killed_and_resumed_the_curve_is_bit_equal(runner: Runner) -> None:
    settings = {**TP2, "schedule__steps": 20, "checkpoint__every_steps": 4}
    runner.check_trains("unbroken", 4, **settings)
    processes = start(4, *runner.arguments("run", **settings), logs=runner.folder / "logs")
    wait_for_step(runner.folder / "run", 10)
    os.killpg(processes[0].pid, signal.SIGKILL)
    for process in processes:
        process.wait()
    runner.check_trains("run", 4, **settings)
    assert runner.losses("run") == runner.losses("unbroken")


@pytest.mark.parametrize(
    ("ranks", "settings", "message"),
    [
        (2, {"parallel__zero_stage": 3}, "parallel.zero_stage is 3; with parallel.tensor_parallel 2 it must be 1 or 2"),
        (1, {}, "parallel.tensor_parallel is 2; it must divide the number of ranks, 1"),
        (4, {"parallel__tensor_parallel": 4}, "parallel.tensor_parallel is 4; it must divide the model's heads, 2"),
        (4, {"parallel__pipeline_stages": 4}, "their product, 8, must divide the number of ranks, 4"),
        (
            3,
            {"parallel__tensor_parallel": 3, "model__width": 48, "model__heads": 3},
            "parallel.sequence_parallel is true; with parallel.tensor_parallel 3 and 64 positions",
        ),
        (2, {"precision": "fp8"}, "precision is fp8; with parallel.tensor_parallel 2 it must be bf16 or fp32"),
    ],
)
def test_invalid_input_is_an_error_before_the_group_starts(
    runner: Runner, ranks: int, settings: dict[str, object], message: str
) -> None:
    finished = runner.train("run", ranks, **{**TP2, **settings})
    assert finished.codes == [2] * ranks
    assert message in finished.output
    assert finished.output.count("\n") == 1
    assert not (runner.folder / "run").exists()
