"""A small shard set, and small runs on it through the command line."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.common.files import locked
from tests.launch import Finished, run

torch.set_num_threads(1)  # a second thread costs more than it brings, and far more on a busy machine

TINY = {
    "model.layers": 2,
    "model.width": 32,
    "model.heads": 2,
    "model.resolution": 8,
    "optimizer.learning_rate": 0.01,
    "schedule.steps": 40,
    "schedule.warmup_steps": 4,
    "batch.global_size": 8,
    "batch.micro_size": 4,
    "checkpoint.every_steps": 10,
    "validation.every_steps": 20,
    "validation.images": 33,
    "samples.every_steps": 0,
    "precision": "fp32",
}


class Runner:
    """Trains through the command line and reads what came out."""

    def __init__(self, shards: Path, folder: Path) -> None:
        self.shards, self.folder = shards, folder

    def arguments(self, name: str, **overrides: Any) -> list[str]:
        """Of `python`: the training of a run; a double underscore stands for the dot of a key."""
        keys = {
            "data.shards": self.shards,
            **TINY,
            **{key.replace("__", "."): value for key, value in overrides.items()},
        }
        options = [f"--{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in keys.items()]
        return ["-m", "pipeline", "train", f"--run={self.folder / name}", *options]

    def train(self, name: str, ranks: int = 1, **overrides: Any) -> Finished:
        """Trains to the end, or to the error."""
        return run(ranks, *self.arguments(name, **overrides), logs=self.folder / f"{name}.logs")

    def check_trains(self, name: str, ranks: int, **overrides: Any) -> None:
        """Trains to the end."""
        finished = self.train(name, ranks, **overrides)
        assert finished.codes == [0] * ranks, "\n".join(finished.outputs)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """metrics.jsonl."""
        return [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]

    def losses(self, name: str) -> list[float]:
        """The training loss of every step; each step must stand there once, in order."""
        rows = [row for row in self.rows(name) if "loss" in row]
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        return [row["loss"] for row in rows]


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that all workers of this pytest share: the first that needs it makes it, the others wait."""
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, complete = base / name, base / f"{name}.complete"
    with locked(base / f"{name}.lock", name):
        if not complete.exists():
            folder.mkdir()
            make(folder)
            complete.touch()
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 small photographs at 8 x 8, 270 of them in train; tests only read them."""

    def make(folder: Path) -> None:
        options = ["--source.kind=photographs", "--source.train_per_class=30", "--source.test_per_class=4"]
        out = f"--out={folder / 'shards'}"
        finished = run(1, "-m", "data_prep", "shards", *options, "--resolution=8", out, logs=folder / "logs")
        assert finished.codes == [0], finished.output

    return made_once(tmp_path_factory, "data", make) / "shards"


@pytest.fixture
def runner(shards: Path, tmp_path: Path) -> Runner:
    """Runs in a folder of the test's own."""
    return Runner(shards, tmp_path)


@pytest.fixture(scope="session")
def finished_run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """A run named "reference", 40 steps on two ranks with ZeRO-1, checkpoints of 20, 30 and 40; tests only read it.

    Its interpreters are fresh, so that runs which are compared with it show that forked programs train alike.
    """

    def make(folder: Path) -> None:
        runner = Runner(shards, folder)
        arguments = runner.arguments("reference", batch__micro_size=2, checkpoint__keep_last=3)
        finished = run(2, *arguments, logs=folder / "reference.logs", fresh=True)
        assert finished.codes == [0, 0], "\n".join(finished.outputs)

    return Runner(shards, made_once(tmp_path_factory, "reference", make))
