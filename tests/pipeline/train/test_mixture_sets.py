"""What a run on a mixture records of its sets: the loss of each, probes that outlive a set, the history of weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ImageGPTForCausalImageModeling

from data_prep.shards.reader import open_shard_set
from pipeline.model_folder.export import export, find_checkpoint
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
    assert abs(alone["one"] - alone["two"]) > 1e-3, "sets that differ"
