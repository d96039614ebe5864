"""Miniatures of Places205 in its official layouts, compared with their own files, and prepared by the command."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.images.decode import BadImage, Decoder
from tests.data_prep.sources import official_layouts as layouts
from tests.data_prep.sources.reading import (
    Expected,
    check_shards,
    found,
    opened,
    opened_jpeg,
    opened_with_peak,
    read,
    reduced,
)


@pytest.fixture
def places205(tmp_path: Path, windows: list[np.ndarray]) -> Path:
    layouts.write_places205(tmp_path / "places", windows)
    return tmp_path / "places"


def places_split(images: Path, file: Path) -> Expected:
    rows = [line.split(" ") for line in file.read_text().splitlines()]
    return {read(images / name): int(label) for name, label in rows}


@pytest.mark.parametrize("official", [True, False])
def test_places205(tmp_path: Path, windows: list[np.ndarray], official: bool) -> None:
    layouts.write_places205(tmp_path, windows, official)
    images = tmp_path / ("data/vision/torralba/deeplearning/images256" if official else "images256")
    lists = tmp_path / ("trainvalsplit_places205" if official else ".")
    source = opened("places205", tmp_path)
    assert source.classes == ["abbey", "airport_terminal", "apartment_building/outdoor", "yard"]
    numbers: list[Any] = list(range(4))
    for split, name, count in (("train", "train", 12), ("test", "val", 4)):
        expected = places_split(images, lists / f"{name}_places205.csv")
        assert found(source, split, numbers) == expected
        assert len(expected) == count
    first = (lists / "train_places205.csv").read_text().split()[0]
    assert source.splits["train"].image(0, Decoder()).tobytes() == read(images / first)


def test_a_missing_image_of_places205_is_a_bad_image(places205: Path) -> None:
    source = opened("places205", places205)
    name = (places205 / "trainvalsplit_places205/train_places205.csv").read_text().split()[4]
    next(places205.rglob(Path(name).name)).unlink()
    with pytest.raises(BadImage) as caught:
        source.splits["train"].image(2, Decoder())
    assert caught.value.reason == "unreadable"
    assert caught.value.name.endswith(name)


Change = Callable[[str], str]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train", lambda text: "", "train_places205.csv lists no images"),
        ("val", lambda text: "\n", "val_places205.csv lists no images"),
        ("train", lambda text: text.replace(" 2", " two"), r"has the line 'a/apartment.* two'; a line must be like"),
        ("train", lambda text: text.replace(" 2", " -1"), r"has the line 'a/apartment.* -1'"),
        ("train", lambda text: text.replace(" 1\n", " 4\n"), "has no image of class 1"),
        (
            "val",
            lambda text: text.replace(" 1\n", " 204\n"),
            "val_places205.csv has class 204, which is not in the training",
        ),
        ("train", lambda text: text.replace(" 1\n", " 0\n", 1), "has class 0 in a/a.*; a class must have one folder"),
        (
            "both",
            lambda text: text.replace("y/yard", "a/abbey"),
            "a/abbey/ is class . and class .; each class must have",
        ),
        ("train", lambda text: text.replace("yard", "yurt"), "has class 3 in y/yard/ and in y/yurt/"),
    ],
)
def test_errors_in_the_lists_of_places205_are_named(places205: Path, name: str, change: Change, message: str) -> None:
    for one in ("train", "val") if name == "both" else (name,):
        file = places205 / f"trainvalsplit_places205/{one}_places205.csv"
        file.write_text(change(file.read_text()))
    with pytest.raises(ValueError, match=message):
        opened("places205", places205)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("data", "places has no data/vision/torralba/deeplearning/images256; extract imagesPlaces205_resize.tar.gz"),
        ("trainvalsplit_places205/val_places205.csv", "val_places205.csv is missing; extract trainvalsplit_places205"),
        ("data/vision/torralba/deeplearning/images256/y", "images256/y/yard is missing"),
    ],
)
def test_missing_parts_of_places205_are_named(places205: Path, gone: str, message: str) -> None:
    (places205 / gone).rename(places205 / "elsewhere")
    with pytest.raises(ValueError, match=message):
        opened("places205", places205)


def test_places205_prepared(places205: Path, prepare: Callable[..., Path]) -> None:
    images = places205 / "data/vision/torralba/deeplearning/images256"
    splits: dict[str, Expected] = {}
    for split, name in (("train", "train"), ("test", "val")):
        rows = (places205 / f"trainvalsplit_places205/{name}_places205.csv").read_text().splitlines()
        pairs = [row.split(" ") for row in rows]
        splits[split] = {reduced(opened_jpeg(images / image)): int(label) for image, label in pairs}
    classes = ["abbey", "airport_terminal", "apartment_building/outdoor", "yard"]
    check_shards(prepare("places205", places205), splits, classes)


def test_a_long_list_takes_little_memory(places205: Path) -> None:
    """A Python string for each name would take 49 bytes more than its characters, and 8 in a list."""
    images = 200_000
    lines = [f"{layouts.PLACES[n % 4]}/gsun_{n:032x}.jpg {n % 4}\n" for n in range(images)]
    (places205 / "trainvalsplit_places205/train_places205.csv").write_text("".join(lines))
    characters = sum(map(len, lines)) - 3 * images
    del lines
    source, kept, peak = opened_with_peak("places205", places205)
    assert len(source.splits["train"]) == images
    assert kept < characters + 16 * images + 1e6
    assert peak < 2 * characters + 64 * images + 1e6
