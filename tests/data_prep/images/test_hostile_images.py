"""Files with wrong names, damaged, oversized or unusual: converted as by Pillow, or skipped."""

import io
import json
import os
import socket
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from data_prep.config import SourceConfig
from data_prep.images.decode import BadImage, Decoder
from data_prep.shards.reader import open_shard_set
from data_prep.sources.open import open_source
from tests.data_prep.images.encoded_images import by_pillow
from tests.data_prep.images.hostile_images import AS_PILLOW, BY_UPPER_BITS, READ, WITHOUT_METADATA, corpus
from tests.data_prep.time_limit import time_limit

SECONDS = 5
"""Within which each file must be processed."""
MEGABYTES = 300
"""Bytes that the corpus may add to a process's peak memory."""


@pytest.fixture(scope="module")
def files() -> dict[str, tuple[bytes, str]]:
    windows = open_source(SourceConfig(kind="photographs", train_per_class=1)).splits["train"]
    return corpus(Image.fromarray(windows.image(1, Decoder())).resize((160, 120)))


def outcome(content: bytes, name: str) -> str:
    """The result for a file, in the terms of the corpus."""
    try:
        with time_limit(SECONDS):
            decoded = Decoder()(content, name)
    except BadImage as bad:
        assert bad.name == name
        assert "\n" not in str(bad)
        return bad.reason
    assert decoded.dtype == np.uint8 and decoded.ndim == 3 and decoded.shape[2] == 3
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content)) as image:
            if image.mode.startswith("I;16"):
                assert (decoded == (np.asarray(image) >> 8)[:, :, None]).all()
                return BY_UPPER_BITS
        reference = by_pillow(content)
    except ValueError:  # Pillow's limit of metadata; OpenCV ignores that
        assert (decoded == cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]).all()
        return WITHOUT_METADATA
    assert decoded.shape == reference.shape
    assert (decoded == reference).all()
    return AS_PILLOW


def test_the_corpus_is_large_and_has_every_reason(files: dict[str, tuple[bytes, str]]) -> None:
    reasons = Counter(expected for _, expected in files.values())
    assert len(files) >= 100
    assert set(reasons) == {*READ, "truncated", "not a picture", "empty", "too large", "damaged"}


def test_every_file_is_converted_as_by_pillow_or_skipped_with_its_reason(files: dict[str, tuple[bytes, str]]) -> None:
    found = {name: outcome(content, name) for name, (content, _) in files.items()}
    assert found == {name: expected for name, (_, expected) in files.items()}


@pytest.mark.parametrize("smallest", [1, 64])
def test_scaled_decode_skips_the_same_files(smallest: int, files: dict[str, tuple[bytes, str]]) -> None:
    for name, (content, expected) in files.items():
        try:
            with time_limit(SECONDS):
                Decoder(smallest)(content, name)
        except BadImage as bad:
            assert (name, bad.reason) == (name, expected)
        else:
            assert expected in READ, name


def test_memory_stays_within_bounds(files: dict[str, tuple[bytes, str]], tmp_path: Path) -> None:
    """In a process of its own, so that its peak memory is the corpus's."""
    for name, (content, _) in files.items():
        (tmp_path / name).write_bytes(content)
    script = """
import resource, sys
from pathlib import Path
from data_prep.images.decode import BadImage, Decoder
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
def decode(file):
    try: Decoder()(file.read_bytes(), file.name)
    except BadImage: pass
decode(Path(sys.argv[1]) / "png_named.jpg")
before = peak()
for file in Path(sys.argv[1]).iterdir(): decode(file)
print(peak() - before)
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=True, cwd=Path(__file__).parents[3]
    )
    assert int(done.stdout) < MEGABYTES


# --- what is no file, and names


@pytest.fixture
def strange_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The image folder's train/cat with everything that a file system can have under an image's name."""
    cat = folder / "train/cat"
    os.mkfifo(cat / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(cat)  # a socket's path may have 107 bytes only
        server.bind("socket.jpg")
        monkeypatch.undo()
    (cat / "device.jpg").symlink_to("/dev/zero")
    (cat / "circle.jpg").symlink_to("circle.jpg")
    (cat / "nowhere.png").symlink_to("missing.png")
    (cat / "up").symlink_to("..")
    (cat / "round").symlink_to(".")
    (cat / "above").symlink_to(folder.parent)
    (cat / "folder.jpg").mkdir()
    (cat / "empty_folder.jpg").mkdir()
    good = next(cat.glob("0*.png")).read_bytes()
    (cat / "folder.jpg/inside.png").write_bytes(good)
    (cat / "link.png").symlink_to("folder.jpg/inside.png")
    Path(os.fsdecode(os.fsencode(cat) + b"/caf\xe9 \xff\n.png")).write_bytes(good)
    with (cat / "sparse.jpg").open("wb") as file:
        file.truncate(3 << 30)
    (folder / "train/circle").symlink_to("circle")
    return folder


STRANGE_SKIPS = {"circle.jpg": "unreadable", "nowhere.png": "unreadable", "sparse.jpg": "too large"}
STRANGE_PICTURES = 3
"""folder.jpg/inside.png, link.png, and the one whose name is not UTF-8."""


def test_only_files_are_listed_and_none_blocks(strange_folder: Path) -> None:
    with time_limit(SECONDS):
        images = open_source(SourceConfig(kind="image_folder", path=str(strange_folder))).splits["train"]
        before = len(list((strange_folder / "train").glob("*/[0-9]*.png")))
        assert len(images) == before + STRANGE_PICTURES + len(STRANGE_SKIPS)
        found, skips = 0, {}
        for index in range(len(images)):
            try:
                assert images.image(index, Decoder()).shape == (32, 32, 3)
                found += 1
            except BadImage as bad:
                skips[Path(bad.name).name] = bad.reason
    assert (found, skips) == (before + STRANGE_PICTURES, STRANGE_SKIPS)


def test_a_folder_that_is_a_link_is_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "train/cat").rename(tmp_path / "elsewhere")
    (folder / "train/cat").symlink_to(tmp_path / "elsewhere")
    images = open_source(SourceConfig(kind="image_folder", path=str(folder))).splits["train"]
    assert (len(images), set(images.labels.tolist())) == (48, {0, 1, 2})


# --- the whole way


@pytest.fixture
def hostile_folder(strange_folder: Path, files: dict[str, tuple[bytes, str]]) -> Path:
    """The corpus mixed with valid images and unusual names."""
    (strange_folder / "train/hostile").mkdir()
    for name, (content, _) in files.items():
        (strange_folder / "train/hostile" / name).write_bytes(content)
    return strange_folder


@pytest.mark.parametrize("workers", [1, 2])
def test_a_preparation_counts_what_it_skips(
    workers: int, hostile_folder: Path, files: dict[str, tuple[bytes, str]], tmp_path: Path, run: Callable[..., Any]
) -> None:
    options = [
        "--source.kind",
        "image_folder",
        "--source.path",
        hostile_folder,
        "--resolution",
        8,
        "--valid_fraction",
        0,
    ]
    options += ["--palette.colors", 16, "--workers", workers, "--max_skipped", 1, "--out", tmp_path / "shards"]
    with time_limit(60):
        result = run("shards", *options)
    assert result.code == 0, result.err
    train = hostile_folder / "train"
    expected = {str(train / "cat" / name): reason for name, reason in STRANGE_SKIPS.items()} | {
        str(train / "hostile" / name): reason for name, (_, reason) in files.items() if reason not in READ
    }
    shard_set = open_shard_set(tmp_path / "shards")
    assert shard_set.manifest["skipped"] == {"train": dict(Counter(expected.values()))}
    lines = [json.loads(line) for line in (tmp_path / "shards/skipped.jsonl").read_text().splitlines()]
    assert all(set(line) == {"split", "name", "reason", "detail"} and line["split"] == "train" for line in lines)
    assert {line["name"]: line["reason"] for line in lines} == expected
    assert len(lines) == len(expected)
    listed = len(open_source(SourceConfig(kind="image_folder", path=str(hostile_folder))).splits["train"])
    assert shard_set.split("train").images == listed - len(expected)
    labels = shard_set.split("train").gather(np.arange(listed - len(expected)))[1]
    assert (labels == shard_set.classes.index("hostile")).sum() == len(files) - len(expected) + len(STRANGE_SKIPS)


def test_too_many_skips_end_a_preparation_with_one_sentence(
    hostile_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    options = ["--source.kind", "image_folder", "--source.path", hostile_folder, "--resolution", 8, "--workers", 1]
    result = run("shards", *options, "--palette.colors", 16, "--out", tmp_path / "shards")
    assert result.code == 2
    assert [line.startswith("error: ") for line in result.err.splitlines()][-2:] == [False, True]  # after the progress
    assert "can't be used, more than max_skipped 0.01 allows" in result.err
    assert "raise --max_skipped" in result.err
    assert not (tmp_path / "shards/shards.json").exists()


def test_images_of_a_split_are_next_to_their_own_source(
    hostile_folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    """`show` ignores skipped images, as the preparation does."""
    options = ["--source.kind", "image_folder", "--source.path", hostile_folder, "--resolution", 8, "--max_skipped", 1]
    assert run("shards", *options, "--palette.colors", 16, "--workers", 1, "--out", tmp_path / "shards").code == 0
    for split in ("train", "valid"):
        result = run("show", tmp_path / "shards", "--split", split, "--images", 1000, "--out", tmp_path / "grid.png")
        assert (result.code, "source image on the left" in result.err) == (0, True), result.err
