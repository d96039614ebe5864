"""A checkpoint of any topology resumes on any other, with the same curve."""

import json
import shutil

import pytest

from tests.launch import run
from tests.pipeline.conftest import Runner
from tests.pipeline.train.engine.test_topologies import FP32_TOLERANCE

TOPOLOGIES = {  # ranks, ZeRO stage, pipeline stages, tensor parallelism
    "1 rank": (1, 1, 1, 1),
    "Z1x2": (2, 1, 1, 1),
    "Z2x2": (2, 2, 1, 1),
    "Z3x2": (2, 3, 1, 1),
    "Z3x4": (4, 3, 1, 1),
    "PP2": (2, 1, 2, 1),
    "PP2xDP2": (4, 1, 2, 1),
    "tp2": (2, 1, 1, 2),
    "tp2xDP2": (4, 2, 1, 2),
    "tp2xPP2": (4, 1, 2, 2),
    "tp2xPP2xDP2": (8, 1, 2, 2),
}
SAVED, LAST = 6, 11
"""The step of the checkpoint that other topologies resume, and the step where they end."""


def settings_of(topology: str, steps: int) -> dict[str, object]:
    _, stage, stages, parts = TOPOLOGIES[topology]
    settings = {"parallel__zero_stage": stage, "parallel__pipeline_stages": stages, "parallel__tensor_parallel": parts}
    return {"batch__micro_size": 2, **settings, "schedule__steps": steps, "schedule__decay": "constant"}


def train_on(runner: Runner, topology: str, name: str, steps: int, **overrides: object) -> None:
    runner.check_trains(name, TOPOLOGIES[topology][0], **settings_of(topology, steps), **overrides)


def train_several_on(runner: Runner, topology: str, steps_of_runs: dict[str, int]) -> None:
    """One run after the other in the same processes, whose start takes longer than the runs."""
    ranks, file = TOPOLOGIES[topology][0], runner.folder / "runs.json"
    runs = [runner.arguments(name, **settings_of(topology, steps))[3:] for name, steps in steps_of_runs.items()]
    file.write_text(json.dumps(runs))
    finished = run(
        ranks, "-m", "tests.pipeline.train.several_runs", file, logs=runner.folder / f"{topology}.logs", seconds=1800
    )
    assert finished.codes == [0] * ranks, "\n".join(finished.outputs)


def train_and_move(runner: Runner, first: str, second: str, **overrides: object) -> float:
    """Trains on one topology, resumes on another; the largest difference from the uninterrupted losses of the first."""
    train_on(runner, first, f"{first} unbroken", LAST, **overrides)
    train_on(runner, first, first, SAVED, **overrides)
    moved = copy_to_move(runner, first, second)
    train_on(runner, second, moved, LAST, **overrides)
    return difference_from_unbroken(runner, first, moved)


def copy_to_move(runner: Runner, first: str, second: str) -> str:
    moved = f"{first} to {second}"
    shutil.copytree(runner.folder / first, runner.folder / moved)
    return moved


def difference_from_unbroken(runner: Runner, first: str, moved: str) -> float:
    rows, unbroken = ([row for row in runner.rows(n) if "loss" in row] for n in (moved, f"{first} unbroken"))
    assert len(rows) == LAST
    for key in ("step", "images", "learning_rate"):
        assert [row[key] for row in rows] == [row[key] for row in unbroken]
    return max(abs(a["loss"] - b["loss"]) for a, b in zip(rows, unbroken, strict=True))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("PP2", "Z3x2"),
        ("tp2xPP2", "tp2"),
        pytest.param("1 rank", "tp2xPP2", marks=pytest.mark.slow),
        pytest.param("tp2xDP2", "tp2xPP2xDP2", marks=pytest.mark.slow),
        pytest.param("tp2xPP2xDP2", "Z2x2", marks=pytest.mark.slow),
        pytest.param("PP2xDP2", "tp2", marks=pytest.mark.slow),
        pytest.param("1 rank", "PP2xDP2", marks=pytest.mark.slow),
        pytest.param("tp2", "1 rank", marks=pytest.mark.slow),
        pytest.param("Z3x2", "tp2xDP2", marks=pytest.mark.slow),
    ],
)
def test_a_run_resumes_on_another_topology(runner: Runner, first: str, second: str) -> None:
    assert train_and_move(runner, first, second) <= FP32_TOLERANCE


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("tp2", "PP2"),
        pytest.param("tp2", "tp2xPP2", marks=pytest.mark.slow),
        pytest.param("Z2x2", "tp2", marks=pytest.mark.slow),
    ],
)
def test_the_stock_block_resumes_on_another_topology(runner: Runner, first: str, second: str) -> None:
    """Its matrices are stored transposed, and have biases."""
    assert train_and_move(runner, first, second, model__block="gpt2") <= FP32_TOLERANCE


@pytest.mark.slow  # minutes
def test_every_topology_resumes_on_every_other(runner: Runner) -> None:
    """And on itself, bit for bit."""
    for first in TOPOLOGIES:
        train_several_on(runner, first, {f"{first} unbroken": LAST, first: SAVED})
    for second in TOPOLOGIES:
        train_several_on(runner, second, {copy_to_move(runner, first, second): LAST for first in TOPOLOGIES})
    differences = {
        (first, second): difference_from_unbroken(runner, first, f"{first} to {second}")
        for first in TOPOLOGIES
        for second in TOPOLOGIES
    }
    print(f"\nlargest difference of a loss, in 1e-7; from \\ to: {', '.join(TOPOLOGIES)}")
    for first in TOPOLOGIES:
        print(f"{first:8} {' '.join(f'{differences[first, second] * 1e7:6.1f}' for second in TOPOLOGIES)}")
    assert max(differences.values()) <= FP32_TOLERANCE
    assert all(differences[topology, topology] == 0 for topology in TOPOLOGIES)
