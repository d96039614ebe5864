"""The README's Python runs as it stands there."""

import re
from pathlib import Path

import numpy as np
import pytest

from data_prep.shards.reader import open_shard_set
from pipeline.model_folder.export import export, find_checkpoint
from tests.launch import ROOT
from tests.pipeline.conftest import Runner


@pytest.fixture
def blocks(shards: Path, finished_run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The Python blocks, and a folder in which what they name is there."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/shards").symlink_to(shards)
    export(find_checkpoint(finished_run.folder / "reference"), tmp_path / "out/model")
    monkeypatch.chdir(tmp_path)
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_plain_webdataset_reads_a_shard_in_one_line(blocks: list[str], shards: Path) -> None:
    names: dict[str, object] = {}
    exec(blocks[0], names)
    pixels, labels = open_shard_set(shards).split("train").record(0)
    assert np.array_equal(names["tokens"], pixels[0])  # type: ignore[arg-type]
    assert names["label"] == labels[0]


def test_transformers_generates_a_picture_from_an_exported_model(blocks: list[str]) -> None:
    names: dict[str, object] = {}
    exec(blocks[1], names)
    tokens = names["tokens"]
    assert tuple(tokens.shape) == (1, 64)  # type: ignore[attr-defined]
    assert int(tokens.max()) < 512  # type: ignore[attr-defined]
