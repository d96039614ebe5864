"""Pipeline stages: the same curve as plain torch, the same samples, and checkpoints that any topology resumes."""

import os
import signal
from pathlib import Path

import pytest

from tests.launch import start
from tests.pipeline.conftest import Runner
from tests.pipeline.train.engine.test_topologies import BF16_TOLERANCE, FP32_TOLERANCE, RATE, train_plainly
from tests.pipeline.train.test_resume import wait_for_step

PP2 = {"parallel__pipeline_stages": 2, "batch__micro_size": 2}


@pytest.fixture(scope="module")
def plain_losses(shards: Path) -> list[float]:
    return train_plainly(shards)


@pytest.mark.parametrize(("ranks", "micro_size", "recompute"), [(2, 2, False), (2, 8, True), (4, 2, False)])
def test_fp32_losses_are_those_of_plain_torch(
    runner: Runner, plain_losses: list[float], ranks: int, micro_size: int, recompute: bool
) -> None:
    settings = {**PP2, "batch__micro_size": micro_size, "parallel__recompute": recompute}
    runner.check_trains("run", ranks, **settings, optimizer__learning_rate=RATE)
    assert runner.losses("run") == pytest.approx(plain_losses, abs=FP32_TOLERANCE)


def test_bf16_losses_stay_near(runner: Runner, plain_losses: list[float]) -> None:
    runner.check_trains("run", 2, **PP2, optimizer__learning_rate=RATE, precision="bf16")
    assert runner.losses("run") == pytest.approx(plain_losses, abs=BF16_TOLERANCE)


@pytest.mark.parametrize("block", ["igpt", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_four_stages_are_as_one_rank(runner: Runner, block: str) -> None:
    """Losses, norms, validation and the drawn completions. 13 validation images leave a micro-batch half full."""
    common = {"model__layers": 4, "model__block": block, "schedule__steps": 10, "samples__every_steps": 10}
    common |= {"batch__micro_size": 2, "validation__images": 13, "optimizer__learning_rate": RATE}
    runner.check_trains("one", 1, **common)
    runner.check_trains("four", 4, **common, parallel__pipeline_stages=4)
    assert runner.losses("four") == pytest.approx(runner.losses("one"), abs=FP32_TOLERANCE)
    for key, tolerance in (("grad_norm", {"rel": 1e-4}), ("valid_loss", {"abs": FP32_TOLERANCE})):
        one, four = ([row[key] for row in runner.rows(name) if key in row] for name in ("one", "four"))
        assert one
        assert four == pytest.approx(one, **tolerance)
    drawn = [(runner.folder / name / "samples/step-00000010.png").read_bytes() for name in ("one", "four")]
    assert drawn[0] == drawn[1]


@pytest.mark.slow
def test_killed_and_resumed_the_curve_is_bit_equal(runner: Runner) -> None:
    settings = {**PP2, "schedule__steps": 20, "checkpoint__every_steps": 4}
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
        (2, {"parallel__zero_stage": 2}, "parallel.zero_stage is 2; with parallel.pipeline_stages 2 it must be 1"),
        (2, {"parallel__zero_stage": 0}, "parallel.zero_stage is 0; with parallel.pipeline_stages 2 it must be 1"),
        (1, {}, "parallel.pipeline_stages is 2; it must divide the number of ranks, 1"),
        (
            4,
            {"parallel__pipeline_stages": 4},
            "parallel.pipeline_stages is 4; it must be at most the model's blocks, 2",
        ),
        (2, {"batch__micro_size": 3}, "batch.global_size is 8; it must be a multiple of batch.micro_size"),
    ],
)
def test_invalid_stages_are_an_error_before_the_group_starts(
    runner: Runner, ranks: int, settings: dict[str, object], message: str
) -> None:
    finished = runner.train("run", ranks, **{**PP2, **settings})
    assert finished.codes == [2] * ranks
    assert message in finished.output
    assert finished.output.count("\n") == 1
    assert not (runner.folder / "run").exists()
