"""Pipeline stages: the same curve as plain torch, the same samples, and checkpoints that any topology resumes."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.launch import start
from tests.pipeline.conftest import Runner
from tests.pipeline.train.test_resume import wait_for_step
from tests.pipeline.train.test_topologies import BF16_TOLERANCE, FP32_TOLERANCE, RATE, train_plainly

PP2 = {"parallel__pipeline_stages": 2, "batch__micro_size": 2}
TOPOLOGIES = {  # ranks, ZeRO stage, pipeline stages
    "1 rank": (1, 1, 1),
    "Z1x2": (2, 1, 1),
    "Z2x2": (2, 2, 1),
    "Z3x2": (2, 3, 1),
    "Z3x4": (4, 3, 1),
    "PP2": (2, 1, 2),
    "PP2xDP2": (4, 1, 2),
}
SAVED, LAST = 6, 11
"""The step of the checkpoint that other topologies go on from, and where they end."""


@pytest.fixture(scope="module")
def plain_losses(shards: Path) -> list[float]:
    return train_plainly(shards)


def check_trains(runner: Runner, name: str, ranks: int, **overrides: object) -> None:
    finished = runner.train(name, ranks, **overrides)
    assert finished.codes == [0] * ranks, "\n".join(finished.outputs)


@pytest.mark.parametrize(("ranks", "micro_size", "recompute"), [(2, 2, False), (2, 8, True), (4, 2, False)])
def test_fp32_losses_are_those_of_plain_torch(
    runner: Runner, plain_losses: list[float], ranks: int, micro_size: int, recompute: bool
) -> None:
    settings = {**PP2, "batch__micro_size": micro_size, "parallel__recompute": recompute}
    check_trains(runner, "run", ranks, **settings, optimizer__learning_rate=RATE)
    assert runner.losses("run") == pytest.approx(plain_losses, abs=FP32_TOLERANCE)


def test_bf16_losses_stay_near(runner: Runner, plain_losses: list[float]) -> None:
    check_trains(runner, "run", 2, **PP2, optimizer__learning_rate=RATE, precision="bf16")
    assert runner.losses("run") == pytest.approx(plain_losses, abs=BF16_TOLERANCE)


@pytest.mark.parametrize("block", ["igpt", "gpt2"])
def test_four_stages_are_as_one_rank(runner: Runner, block: str) -> None:
    """Losses, norms, validation and the drawn completions. 13 validation pictures leave a micro-batch half full."""
    common = {"model__layers": 4, "model__block": block, "schedule__steps": 10, "samples__every_steps": 10}
    common |= {"batch__micro_size": 2, "validation__images": 13, "optimizer__learning_rate": RATE}
    check_trains(runner, "one", 1, **common)
    check_trains(runner, "four", 4, **common, parallel__pipeline_stages=4)
    assert runner.losses("four") == pytest.approx(runner.losses("one"), abs=FP32_TOLERANCE)
    for key, tolerance in (("grad_norm", {"rel": 1e-4}), ("valid_loss", {"abs": FP32_TOLERANCE})):
        one, four = ([row[key] for row in runner.rows(name) if key in row] for name in ("one", "four"))
        assert one
        assert four == pytest.approx(one, **tolerance)
    drawn = [(runner.folder / name / "samples/step-00000010.png").read_bytes() for name in ("one", "four")]
    assert drawn[0] == drawn[1]


def test_killed_and_resumed_the_curve_is_bit_equal(runner: Runner) -> None:
    settings = {**PP2, "schedule__steps": 20, "checkpoint__every_steps": 4}
    check_trains(runner, "unbroken", 4, **settings)
    processes = start(4, *runner.arguments("run", **settings), logs=runner.folder / "logs")
    wait_for_step(runner.folder / "run", 10)
    os.killpg(processes[0].pid, signal.SIGKILL)
    for process in processes:
        process.wait()
    check_trains(runner, "run", 4, **settings)
    assert runner.losses("run") == runner.losses("unbroken")


def train_on(runner: Runner, topology: str, name: str, steps: int) -> None:
    ranks, stage, stages = TOPOLOGIES[topology]
    settings = {"parallel__zero_stage": stage, "parallel__pipeline_stages": stages, "batch__micro_size": 2}
    check_trains(runner, name, ranks, **settings, schedule__steps=steps, schedule__decay="constant")


def train_and_move(runner: Runner, first: str, second: str) -> float:
    """Trains on one topology, goes on with another; the largest difference from the unbroken losses of the first."""
    for name, steps in ((f"{first} unbroken", LAST), (first, SAVED)):
        if not (runner.folder / name).exists():
            train_on(runner, first, name, steps)
    moved = f"{first} to {second}"
    shutil.copytree(runner.folder / first, runner.folder / moved)
    train_on(runner, second, moved, LAST)
    rows, unbroken = ([row for row in runner.rows(n) if "loss" in row] for n in (moved, f"{first} unbroken"))
    assert len(rows) == LAST
    for key in ("step", "images", "learning_rate"):
        assert [row[key] for row in rows] == [row[key] for row in unbroken]
    return max(abs(a["loss"] - b["loss"]) for a, b in zip(rows, unbroken, strict=True))


@pytest.mark.parametrize(("first", "second"), [("PP2", "Z3x2"), ("1 rank", "PP2xDP2"), ("PP2xDP2", "PP2")])
def test_stages_resume_elsewhere_and_others_as_stages(runner: Runner, first: str, second: str) -> None:
    assert train_and_move(runner, first, second) <= FP32_TOLERANCE


@pytest.mark.slow  # six minutes
def test_every_topology_resumes_on_every_other(runner: Runner) -> None:
    differences = {
        (first, second): train_and_move(runner, first, second)
        for first in TOPOLOGIES
        for second in TOPOLOGIES
        if first != second
    }
    print(f"\nlargest difference of a loss, in 1e-7; from \\ to: {', '.join(TOPOLOGIES)}")
    for first in TOPOLOGIES:
        row = (f"{differences.get((first, second), 0) * 1e7:6.1f}" for second in TOPOLOGIES)
        print(f"{first:8} {' '.join(row)}")
    assert max(differences.values()) <= FP32_TOLERANCE


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
def test_mistakes_about_stages_are_said_before_the_group_starts(
    runner: Runner, ranks: int, settings: dict[str, object], message: str
) -> None:
    finished = runner.train("run", ranks, **{**PP2, **settings})
    assert finished.codes == [2] * ranks
    assert message in finished.output
    assert finished.output.count("\n") == 1
    assert not (runner.folder / "run").exists()
