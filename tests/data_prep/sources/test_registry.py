"""A source is one file and one entry of the registry."""

import json
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.config import SourceConfig
from data_prep.shards.reader import open_shard_set
from data_prep.sources.registry import SOURCES, SourceKind

TOY = '''
"""Squares of one gray, as PATH/squares.npy lists them."""

import numpy as np

from data_prep.sources.base import ImageArray, Source, fingerprint


def open_source(config):
    grays = np.load(f"{config.path}/squares.npy")
    pixels = np.broadcast_to(grays[:, None, None, None], (len(grays), 9, 9, 3)).copy()
    return Source("squares", ["dark", "bright"], {"train": ImageArray(pixels, grays > 127)}, {}, fingerprint(grays))
'''


def test_a_new_source_is_a_file_and_an_entry(
    tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toy_squares.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(SOURCES, "squares", SourceKind("toy_squares", "squares of one gray"))
    np.save(tmp_path / "squares.npy", np.array([0, 40, 200, 240], np.uint8))

    assert "squares (squares of one gray)" in " ".join(run("shards", "--help").out.split())
    options = ["--source.kind", "squares", "--resolution", 4, "--palette.colors", 4, "--valid_fraction", 0]
    assert "source.path is not set; source.kind squares" in run("shards", *options, "--out", tmp_path / "out").err
    options += ["--source.path", tmp_path, "--workers", 1]
    assert "source.streaming belongs to" in run("shards", *options, "--source.streaming=true", "--out", tmp_path).err
    result = run("shards", *options, "--out", tmp_path / "out")
    assert result.code == 0, result.err

    shards = open_shard_set(tmp_path / "out")
    tokens, labels = shards.split("train").gather(np.arange(4))
    grays = np.round((shards.palette[tokens[:, 0]].mean(1) + 1) * 127.5)
    assert shards.classes == ["dark", "bright"]
    assert sorted(zip(grays, labels, strict=True)) == [(0, 0), (40, 0), (200, 1), (240, 1)]


WRONG = """
import json

import numpy as np

from data_prep.sources.base import Encoded, ImageArray, Source


class Shaped(ImageArray):
    def __init__(self, shape, labels):
        self.shape, self.labels = shape, np.array(labels)

    def image(self, index, decode):
        return np.zeros(self.shape, np.uint8)


class Stream(list):
    name = "stream"


def open_source(config):
    with open(f"{config.path}/wrong.json") as file:
        wrong = json.load(file)
    splits = {"train": Shaped((8, 8, 3), [0] * 4), "test": Shaped(wrong["shape"], wrong["labels"])}
    if not wrong["streamed"]:
        return Source("wrong", wrong["classes"], splits, {}, "")
    content = b"P6 8 8 255 " + bytes(8 * 8 * 3)
    stream = Stream(Encoded(str(label), content, label) for label in wrong["labels"])
    return Source("wrong", wrong["classes"], {"train": splits["train"]}, {"test": [stream]}, "")
"""


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"labels": [0, -5]}, "wrong has an image in test with the label -5; it must be 0 to 1"),
        ({"labels": [0, 2]}, "wrong has an image in test with the label 2; it must be 0 to 1"),
        ({"labels": [0, -5], "classes": []}, "wrong has an image in test with the label -5"),
        ({"labels": [0, -5], "streamed": True}, "wrong has an image in test with the label -5"),
        ({"labels": [0, 2], "streamed": True}, "wrong has an image in test with the label 2"),
        ({"shape": [8, 8]}, "wrong returns image 0 of test as uint8 (8, 8); it must be uint8 (height, width, 3)."),
        ({"shape": [8, 8, 4]}, "wrong returns image 0 of test as uint8 (8, 8, 4)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("workers", [1, 2])
def test_invalid_labels_and_shapes_of_a_source(
    wrong: dict[str, Any],
    message: str,
    workers: int,
    tmp_path: Path,
    run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "wrong_source.py").write_text(WRONG)
    right = {"labels": [0], "shape": [8, 8, 3], "classes": ["dark", "bright"], "streamed": False}
    (tmp_path / "wrong.json").write_text(json.dumps(right | wrong))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(SOURCES, "wrong", SourceKind("wrong_source", "what is wrong"))
    options = ["--source.kind", "wrong", "--source.path", tmp_path, "--resolution", 4, "--palette.colors", 4]
    result = run("shards", *options, "--workers", workers, "--valid_fraction", 0, "--out", tmp_path / "out")
    assert (result.code, message in result.err) == (2, True), result.err
    assert not (tmp_path / "out/shards.json").exists()


def test_an_unknown_kind_ends_before_anything_is_read(tmp_path: Path, run: Callable[..., Any]) -> None:
    result = run(
        "shards", "--source.kind", "pictures", "--source.path", tmp_path / "nowhere", "--out", tmp_path / "out"
    )
    assert result.code == 2
    assert f"source.kind is 'pictures'; it must be one of {', '.join(SOURCES)}." in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", SOURCES)
def test_every_entry_names_an_existing_module_and_options(name: str) -> None:
    kind = SOURCES[name]
    assert callable(import_module(kind.module).open_source)
    assert set(kind.options) <= {option.name for option in fields(SourceConfig)}
