"""What a run on a mixture records of its sets: the loss of each, probes that outlive a set, the history of weights."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import ImageGPTForCausalImageModeling

from data_prep.shards.reader import open_shard_set
from pipeline.checkpoint.format import open_checkpoint
from pipeline.model.image_grid import completion_grid
from pipeline.model_folder.export import export, find_checkpoint
from pipeline.model_folder.training_record import read_training_record
from pipeline.operate.status import describe, read_status
from pipeline.plan.command import plan_command
from pipeline.train.validation import spread
from tests.pipeline.conftest import TINY, Runner
from tests.pipeline.evaluate.tiny_sets import COLORS, RESOLUTION, random_images, random_palette, write_shard_set

SMALL = TINY | {
    "model.resolution": RESOLUTION,
    "schedule.steps": 8,
    "validation.every_steps": 8,
    "validation.images": 9,
}


class MixtureRunner(Runner):
    """Runs of several small sets: `one`, `two` and `three`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, folder)
        for seed, name in enumerate(("one", "two", "three")):
            splits = {"train": random_images(60, seed), "valid": random_images(21, seed + 10, preference=1 + 4 * seed)}
            write_shard_set(folder / name, splits | {"test": random_images(10, seed + 20)}, random_palette())

    def mixture(self, **weights: float) -> str:
        return json.dumps([{"shards": str(self.folder / name), "weight": weight} for name, weight in weights.items()])

    def arguments(self, name: str, **overrides: Any) -> list[str]:
        keys = SMALL | {key.replace("__", "."): value for key, value in overrides.items()}
        return ["-m", "pipeline", "train", f"--run={self.folder / name}", *(f"--{k}={v}" for k, v in keys.items())]


@pytest.fixture
def runner(tmp_path: Path) -> MixtureRunner:
    return MixtureRunner(tmp_path)


def nats(model: Path, shards: Path, images: int) -> float:
    """The loss of an exported model on a set's held-out images, by transformers and torch in fp64."""
    split = open_shard_set(shards).split("valid")
    tokens = torch.from_numpy(split.gather(spread(split.images, images))[0].astype(np.int64))
    inputs = torch.cat([torch.full((len(tokens), 1), COLORS), tokens[:, :-1]], dim=1)
    with torch.no_grad():
        logits = ImageGPTForCausalImageModeling.from_pretrained(model).double()(input_ids=inputs).logits
    return float(torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens))


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({}, marks=pytest.mark.slow, id="one rank"),
        pytest.param({"parallel__zero_stage": 3, "batch__micro_size": 2}, id="ZeRO-3"),
        pytest.param({"parallel__pipeline_stages": 2}, marks=pytest.mark.slow, id="stages"),
    ],
)
def test_the_loss_of_each_set_is_that_of_the_set_alone(layout: dict[str, Any], runner: MixtureRunner) -> None:
    mixture = runner.mixture(one=7, two=3)
    runner.check_trains("run", 2 if layout else 1, data__mixture=mixture, **layout)
    [row] = [row for row in runner.rows("run") if "valid_loss" in row]
    export(find_checkpoint(runner.folder / "run"), runner.folder / "model")
    alone = {name: nats(runner.folder / "model", runner.folder / name, images=9) for name in ("one", "two")}
    assert row["valid_loss_by_set"] == pytest.approx(alone, abs=1e-6, rel=0)
    assert row["valid_loss"] == pytest.approx(0.7 * alone["one"] + 0.3 * alone["two"], abs=1e-6, rel=0)
    assert abs(alone["one"] - alone["two"]) > 1e-4, "sets that differ"


def test_a_run_whose_sets_change_is_recorded(runner: MixtureRunner, tmp_path: Path) -> None:
    """The second start has no longer the set of the check image of the checkpoint that it resumes from."""
    samples, saves = {"samples__every_steps": 8, "samples__images": 3}, {"checkpoint__every_steps": 8}
    runner.check_trains("run", 1, data__mixture=runner.mixture(one=0.5, two=0.5), **samples, **saves)
    sample = np.asarray(Image.open(tmp_path / "run/samples/step-00000008.png"))
    runner.check_trains("run", 1, data__mixture=runner.mixture(three=1, two=3), schedule__steps=12, **saves)
    resumed = (tmp_path / "run.logs/rank-0.log").read_text()
    [now, saved] = re.search(r"loss of the check image is ([\d.]+) \(when saved: ([\d.]+)\)", resumed).groups()
    assert float(now) == pytest.approx(float(saved), abs=1e-5)
    assert sample.shape[0] == completions_height(images=6), "three images of each of two sets"

    shards = json.loads((tmp_path / "run/run.json").read_text())["shards"]["mixture"]
    assert [(one["name"], one["weight"], one["images"]) for one in shards] == [
        ("three", 0.25, {"train": 60, "valid": 21}),
        ("two", 0.75, {"train": 60, "valid": 21}),
    ]
    history = json.loads((tmp_path / "run/run.json").read_text())["mixture_history"]
    assert [(change["images"], {one["name"]: one["weight"] for one in change["sets"]}) for change in history] == [
        (0, {"one": 0.5, "two": 0.5}),
        (64, {"three": 0.25, "two": 0.75}),
    ]
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    last = runner.rows("run")[-1]
    assert last["valid_loss_by_set"].keys() == {"three", "two"}
    for name, loss in last["valid_loss_by_set"].items():
        assert events.Scalars(f"valid/loss/{name}")[-1].value == pytest.approx(loss)
    epochs = [events.Scalars(f"train/epoch/{name}")[-1].value for name in ("three", "two")]
    digest = open_shard_set(tmp_path / "two").digest
    before = open_checkpoint(tmp_path / "run/checkpoints/step-00000012").record.mixture[-1]["consumed"][digest]
    assert sum(epochs) * 60 == pytest.approx(before + 4 * 8), "four steps of 8 images, and what `two` had read before"
    status = describe(read_status(tmp_path / "run"))
    assert f"two {last['valid_loss_by_set']['two']:.4f}" in status

    for step, changed in ((8, False), (12, True)):
        model = tmp_path / f"model-{step}"
        export(find_checkpoint(tmp_path / "run", step), model)
        digests = {name: open_shard_set(tmp_path / name).digest for name in ("one", "two", "three")}
        known = ["one", "two", *["three"] * changed]
        assert set(read_training_record(model).trained_on) == {digests[name] for name in known}
        card = (model / "README.md").read_text()
        assert re.search(r"Last validation loss of each set \| \w+ \d\.\d{4}, two \d\.\d{4} \|", card)
        data = "dots (one) 0%, dots (two) 75%, dots (three) 25%" if changed else "dots (one) 50%, dots (two) 50%"
        assert f"| Data | {data} |" in card
        read = read_training_record(model).images_of_sets
        assert sum(read.values()) == 8 * step
        assert (read.get(digests["three"], 0) > 0) == changed
        assert f"two, weight {0.75 if changed else 0.5}, {read[digests['two']]:,} images read, sha256" in card
        assert "Mean of the sets | with the weights of that time" in card
        assert ("one 50%, two 50% from image 0 on; three 25%, two 75% from image 64 on" in card) == changed


@pytest.mark.parametrize(
    "weights", [{"one": 1, "two": 3}, pytest.param({"one": 1, "two": 1}, marks=pytest.mark.slow)], ids=str
)
def test_a_start_continues_a_mixture_as_a_resume_does(runner: MixtureRunner, weights: dict[str, float]) -> None:
    """Position, images and epochs of each set; with other weights and with the same ones."""
    keys = {"schedule__decay": "constant", "schedule__warmup_steps": 0, "checkpoint__every_steps": 8}
    runner.check_trains("trunk", 1, data__mixture=runner.mixture(one=1, two=1), **keys)
    branch = {"start__path": runner.folder / "trunk", "start__moments": "true", "start__position": "true"}
    keys["data__mixture"] = runner.mixture(**weights)
    runner.check_trains("branch", 1, **keys | branch, schedule__steps=4)
    runner.check_trains("trunk", 1, **keys, schedule__steps=12)
    assert runner.losses("branch") == pytest.approx(runner.losses("trunk")[8:], abs=1e-6)
    for name in ("branch", "trunk"):
        log = (runner.folder / f"{name}.logs/rank-0.log").read_text()
        planned = re.search(r"at the end of the run: one ([-.\d]+) .*, two ([-.\d]+) \(", log).groups()
        events = EventAccumulator(str(runner.folder / name / "tensorboard")).Reload()
        read = [events.Scalars(f"train/epoch/{one}")[-1].value for one in ("one", "two")]
        assert list(map(float, planned)) == pytest.approx(read, abs=0.006)
        assert sum(read) * 60 == pytest.approx(96), "8 steps of the trunk and 4 of the branch, of 8 images each"


def completions_height(images: int) -> int:
    """Of the grid of completions."""
    tokens = np.zeros((images, RESOLUTION**2), np.uint16)
    drawn = np.zeros((images, 2, RESOLUTION**2), np.uint16)
    return completion_grid(tokens, drawn, random_palette(), RESOLUTION).shape[0]


def test_a_plan_has_the_epochs_of_each_set(runner: MixtureRunner, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--accelerator", "cpu", "--ranks", "1", "--data.mixture", runner.mixture(one=7, two=3)]
    plan_command([*options, *(f"--{key}={value}" for key, value in SMALL.items())])
    assert "64 images, one 70.0%, 0.7 epochs of 60; two 30.0%, 0.3 epochs of 60;" in capsys.readouterr().out
