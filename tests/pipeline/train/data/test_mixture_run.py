"""Real runs on mixtures: the images that the ranks read through kills, changes of the weights and of the ranks."""

import json
import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.shards.reader import open_shard_set
from pipeline.train.data.batches import ImageOrder
from tests.http_server import Server
from tests.launch import Finished, finish, start
from tests.pipeline.conftest import Runner
from tests.pipeline.train.data.mixture_sets import RESOLUTION
from tests.pipeline.train.test_resume import wait_for_step

IMAGES = {"a": 350, "b": 270}
BATCH = 200
STEPS = 50
"""10,000 images."""

RECORDING = """
import os, runpy
from pathlib import Path
import numpy as np
from pipeline.train.loop import Trainer
read, folder = Trainer.read_batch, Path(os.environ["IMAGES_READ"])

def record(trainer, done):
    batch = read(trainer, done)
    if batch.error is None and done.step < trainer.last_step:
        tokens = batch.value(False).tokens[:, :2]
        file = folder / f"{done.step:05d}-{trainer.engine.data_rank}of{trainer.engine.data_ranks}"
        partial = file.with_suffix(f".{os.getpid()}")
        with partial.open("wb") as opened:
            np.save(opened, tokens)
        partial.rename(file)
    return batch

Trainer.read_batch = record
runpy.run_module("pipeline", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IGPT_CACHE", str(tmp_path / "cache"))


class MixtureRunner(Runner):
    """Runs on mixtures; what the ranks read is in the folder images-NAME."""

    def options(self, weights: dict[str, float], **overrides: Any) -> dict[str, Any]:
        mixture = [{"shards": shards, "weight": weight} for shards, weight in weights.items()]
        return {
            "data__shards": "null",
            "data__mixture": json.dumps(mixture),
            "model__resolution": RESOLUTION,
            "model__layers": 1,
            "batch__global_size": BATCH,
            "batch__micro_size": 50,
            "schedule__steps": STEPS,
            "schedule__warmup_steps": 1,
            "checkpoint__every_steps": 2,
            "checkpoint__keep_last": 5,
            "validation__every_steps": 1000,
            **overrides,
        }

    def begin(self, name: str, ranks: int, weights: dict[str, float], **overrides: Any) -> list[Any]:
        images = self.folder / f"images-{name}"
        images.mkdir(exist_ok=True)
        os.environ["IMAGES_READ"] = str(images)
        arguments = self.arguments(name, **self.options(weights, **overrides))
        return start(ranks, "-c", RECORDING, *arguments[2:], logs=self.folder / f"{name}.logs")

    def go_on(self, name: str, ranks: int, weights: dict[str, float], **overrides: Any) -> Finished:
        finished = finish(self.begin(name, ranks, weights, **overrides), self.folder / f"{name}.logs")
        assert finished.codes == [0] * ranks, "\n".join(finished.outputs)
        return finished

    def kill(self, processes: list[Any]) -> None:
        with suppress(ProcessLookupError):  # it may have ended
            os.killpg(processes[0].pid, signal.SIGKILL)
        for process in processes:
            process.wait()

    def images(self, name: str, steps: int = STEPS) -> np.ndarray:
        """(images, 2): the mark of the set and the number of each image, in the order of the run."""
        read = []
        for step in range(steps):
            newest = max(
                (self.folder / f"images-{name}").glob(f"{step:05d}-*of*[0-9]"), key=lambda f: f.stat().st_mtime_ns
            )
            ranks = int(newest.name.partition("of")[2])
            share = [np.load(newest.with_name(f"{step:05d}-{rank}of{ranks}")) for rank in range(ranks)]
            read.append(np.stack(share, axis=1).reshape(BATCH, 2))
        return np.concatenate(read)


def check_epochs(images: np.ndarray) -> None:
    """None of a set is lost or repeated within its epoch."""
    for mark, count in enumerate(IMAGES.values()):
        numbers = images[images[:, 0] == mark, 1]
        for first in range(0, len(numbers), count):
            assert len(set(numbers[first : first + count])) == len(numbers[first : first + count])


@pytest.mark.slow
def test_ten_kills_on_any_ranks_leave_the_images_of_an_unbroken_run(root: Path, tmp_path: Path) -> None:
    runner, weights = MixtureRunner(root, tmp_path), {str(root / "a"): 0.7, str(root / "b"): 0.3}
    runner.go_on("unbroken", 1, weights)
    expected = runner.images("unbroken")
    assert np.bincount(expected[:, 0]).tolist() == [7000, 3000]
    assert {tuple(np.bincount(block)) for block in expected[:, 0].reshape(10, 1000)} == {(700, 300)}
    for mark, name in enumerate(IMAGES):
        alone = ImageOrder(open_shard_set(root / name).split("train").record_images, 0)
        numbers = expected[expected[:, 0] == mark, 1]
        assert numbers.tolist() == alone.image_numbers(0, len(numbers))
    moments, target = random.Random(7), 0
    for kill in range(10):
        target = min(target + moments.randint(1, 6), STEPS - 2)
        processes = runner.begin("killed", (1, 2, 4)[kill % 3], weights)
        wait_for_step(runner.folder / "killed", target)
        time.sleep(moments.uniform(0, 0.05))
        runner.kill(processes)
    for ranks in (2, 4):
        runner.go_on(f"of {ranks}", ranks, weights, schedule__steps=10)
        assert np.array_equal(runner.images(f"of {ranks}", 10), expected[: 10 * BATCH])
    runner.go_on("killed", 2, weights)
    assert np.array_equal(runner.images("killed"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("streamed", ["", "a"])
def test_changed_weights_take_effect_from_the_next_image(
    streamed: str, root: Path, server: Server, tmp_path: Path
) -> None:
    runner = MixtureRunner(root, tmp_path)
    a, b = (f"{server.url}/{name}" if name in streamed else str(root / name) for name in IMAGES)
    first = runner.go_on("run", 2, {a: 0.7, b: 0.3}, schedule__steps=12)
    before = runner.images("run", 12)
    in_a, in_b = np.bincount(before[:, 0]) / list(IMAGES.values())
    line = f"epochs of each set at the end of the run: a {in_a:.2f} (weight 0.7), b {in_b:.2f} (weight 0.3)"
    assert line in first.output
    second = runner.go_on("run", 2, {a: 0.2, b: 0.8}, schedule__steps=24)
    images = runner.images("run", 24)
    assert np.array_equal(images[: len(before)], before)
    assert np.bincount(images[2400:, 0][:2000]).tolist() == [400, 1600]
    check_epochs(images)
    assert (
        "the mixture changes from image 2,400 on: a 0.7 -> 0.2, b 0.3 -> 0.8; images read so far: a 1," in second.output
    )
    # a kill after the change, then an earlier checkpoint: the images are those that followed it
    last = runner.go_on("run", 2, {a: 0.2, b: 0.8}, resume_from=22, schedule__steps=24)
    assert "the mixture changes" not in last.output
    assert np.array_equal(runner.images("run", 24), images)


@pytest.mark.slow
def test_one_set_streamed_and_one_local_through_kills(root: Path, server: Server, tmp_path: Path) -> None:
    runner, weights = MixtureRunner(root, tmp_path), {f"{server.url}/a": 0.7, str(root / "b"): 0.3}
    runner.go_on("unbroken", 2, weights, schedule__steps=20)
    expected = runner.images("unbroken", 20)
    check_epochs(expected)
    moments = random.Random(3)
    for target in (3, 8, 14):
        processes = runner.begin("killed", 2, weights, schedule__steps=20)
        wait_for_step(runner.folder / "killed", target)
        time.sleep(moments.uniform(0, 0.05))
        runner.kill(processes)
    runner.go_on("killed", 2, weights, schedule__steps=20)
    assert np.array_equal(runner.images("killed", 20), expected)
    assert runner.losses("killed") == runner.losses("unbroken")
    runner.go_on("more ranks", 2, weights, schedule__steps=10)
    runner.go_on("more ranks", 4, weights, schedule__steps=20)
    check_epochs(runner.images("more ranks", 20))


@pytest.mark.slow
def test_a_run_of_one_set_resumes_as_a_mixture_and_back(root: Path, tmp_path: Path) -> None:
    runner, a, b = MixtureRunner(root, tmp_path), str(root / "a"), str(root / "b")
    single = {"data__shards": a, "data__mixture": "null"}
    runner.go_on("run", 1, {a: 1}, schedule__steps=2, **single)
    finished = runner.go_on("run", 1, {b: 1, a: 3}, schedule__steps=12)
    assert "the mixture changes from image 400 on: a 1 -> 0.75, b 0.25 added" in finished.output
    finished = runner.go_on("run", 2, {a: 1}, schedule__steps=14, **single)
    assert "the mixture changes from image 2,400 on: a 0.75 -> 1, b 0.25 removed" in finished.output
    rows = runner.losses("run")
    assert len(rows) == 14
    processes = runner.begin("run", 1, {b: 1}, schedule__steps=16)
    refused = finish(processes, runner.folder / "run.logs")
    assert refused.codes == [2]
    assert "data.mixture has none of the shard sets" in refused.output
