"""The report and results.json state how many images of valid and test are also in train."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.shards.reader import ShardSet
from pipeline.results.provenance import ModelFacts
from pipeline.results.report.page import write_report

FACTS = ModelFacts("d", "igpt", "next_color", 1, 1, 1, 1, 8, "p", *[None] * 7, training_commands=())


@pytest.mark.parametrize(
    ("counted", "words"),
    [
        ({"valid": 0, "test": 1003}, "0 of 2,000 of valid, 1,003 of 4,000 of test (equal tokens)"),
        ({"test": 3}, "3 of 4,000 of test (equal tokens)"),
        ({}, "not counted"),  # sets that were prepared by earlier versions
    ],
)
def test_images_that_are_also_in_train(tmp_path: Path, counted: dict[str, int], words: str) -> None:
    splits: dict[str, Any] = {"train": {"images": 9000}, "valid": {"images": 2000}, "test": {"images": 4000}}
    for name, images in counted.items():
        splits[name]["images_in_train"] = images
    facts = {"source": {"name": "x"}, "classes": [], "resolution": 8, "palette": {"colors": 2, "sha256": "p"}}
    shards = ShardSet(Path("x"), {**facts, "splits": splits}, np.zeros((2, 3), np.float32))
    page = write_report(tmp_path, FACTS, shards)
    assert f"<dt>Images also in train</dt><dd>{words}</dd>" in page.read_text()
    assert json.loads((tmp_path / "results.json").read_text())["dataset"]["images_in_train"] == counted


def test_an_average_has_no_validation_loss_of_the_run(tmp_path: Path) -> None:
    """The logged loss is of the newest checkpoint, not of the averaged weights."""
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 5, "images": 50, "valid_loss": 1.5}\n')
    manifest = {"source": {"name": "x"}, "classes": [], "resolution": 8, "palette": {"colors": 2, "sha256": "p"}}
    shards = ShardSet(Path("x"), {**manifest, "splits": {}}, np.zeros((2, 3), np.float32))
    one = replace(FACTS, metrics=metrics, checkpoint_step=5)
    for facts, loss in ((one, 1.5), (replace(one, averaged_steps=(3, 5)), None)):
        page = write_report(tmp_path, facts, shards).read_text()
        assert json.loads((tmp_path / "results.json").read_text())["model"]["valid_loss"] == loss
        assert ("<dd>the mean of those at steps 3, 5</dd>" in page) == (loss is None)
