"""Batch-size warm-up, and dropout that resumes bit for bit."""

import os
import signal
from pathlib import Path

import pytest

from pipeline.config import BatchConfig
from tests.launch import start
from tests.pipeline.conftest import Runner
from tests.pipeline.train.engine.test_topologies import FP32_TOLERANCE, RATE, train_plainly
from tests.pipeline.train.test_resume import wait_for_step

GROWING = {"batch__first_size": 4, "batch__warmup_steps": 15, "batch__global_size": 12, "batch__micro_size": 2}
SIZES = [4] * 5 + [8] * 5 + [12] * 30


def test_sizes_are_a_function_of_the_step() -> None:
    batch = BatchConfig(global_size=12, micro_size=2, warmup_steps=15, first_size=4)
    assert [batch.size_at(step) for step in range(1, 41)] == SIZES
    assert [batch.images_after(steps) for steps in range(41)] == [sum(SIZES[:steps]) for steps in range(41)]


@pytest.mark.parametrize(
    ("ranks", "stages"),
    [(1, 1), pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(2, 2, marks=pytest.mark.slow)],
)
def test_a_growing_batch_is_as_in_plain_torch(runner: Runner, shards: Path, ranks: int, stages: int) -> None:
    """Stopped while the batch grows, and resumed."""
    settings = {**GROWING, "parallel__pipeline_stages": stages, "optimizer__learning_rate": RATE}
    runner.check_trains("run", ranks, **settings, schedule__steps=7, schedule__decay="constant")
    runner.check_trains("run", ranks, **settings, schedule__steps=20, schedule__decay="constant")
    runner.check_trains("unbroken", ranks, **settings)
    assert [row["images"] for row in runner.rows("run") if "loss" in row] == [sum(SIZES[:n]) for n in range(1, 21)]
    plain = train_plainly(shards, sizes=SIZES)
    assert runner.losses("unbroken") == pytest.approx(plain, abs=FP32_TOLERANCE)
    # The warm-up of the rate ends before the batch's; a constant rate differs from the cosine's after it.
    assert runner.losses("run")[:5] == pytest.approx(plain[:5], abs=FP32_TOLERANCE)


def test_invalid_sizes_are_an_error(runner: Runner) -> None:
    finished = runner.train("run", 1, **{**GROWING, "batch__first_size": 5})
    assert "batch.first_size is 5; it must divide batch.global_size, 12" in finished.output
    finished = runner.train("run", 2, **{**GROWING, "batch__micro_size": 6})
    assert "batch.first_size is 4; it must be a multiple of batch.micro_size" in finished.output
    finished = runner.train("run", 1, **{**GROWING, "batch__warmup_steps": 0})
    assert "batch.first_size is 4; set both for a batch that grows, or neither" in finished.output


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (1, {"parallel__zero_stage": 0}),
        pytest.param(2, {"parallel__zero_stage": 1, "parallel__recompute": True}, marks=pytest.mark.slow),
        pytest.param(2, {"parallel__zero_stage": 3}, marks=pytest.mark.slow),
        pytest.param(2, {"parallel__pipeline_stages": 2}, marks=pytest.mark.slow),
    ],
)
def test_dropout_resumes_bit_for_bit(runner: Runner, ranks: int, settings: dict[str, object]) -> None:
    common = {**settings, "model__dropout": 0.1, "schedule__steps": 20, "checkpoint__every_steps": 4}
    common |= {"batch__micro_size": 2, "validation__every_steps": 3}
    runner.check_trains("unbroken", ranks, **common)
    processes = start(ranks, *runner.arguments("run", **common), logs=runner.folder / "logs")
    wait_for_step(runner.folder / "run", 10)
    os.killpg(processes[0].pid, signal.SIGKILL)
    for process in processes:
        process.wait()
    runner.check_trains("run", ranks, **common)
    assert runner.losses("run") == runner.losses("unbroken")
    runner.check_trains("without", ranks, **{**common, "model__dropout": 0})
    assert runner.losses("without") != runner.losses("unbroken")
