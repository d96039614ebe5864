"""The report and results.json state how many images of valid and test are also in train."""

import json
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
