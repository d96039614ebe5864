"""A miniature of STL-10 in its official layout, compared with the layout's own files, and prepared by the command."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep.images.crops import area_resize
from data_prep.images.decode import Decoder
from tests.data_prep.small_data import archive_of
from tests.data_prep.sources import official_layouts as layouts
from tests.data_prep.sources.reading import (
    Expected,
    check_shards,
    found,
    opened,
    reduced,
)


@pytest.fixture
def stl10(tmp_path: Path, windows: list[np.ndarray]) -> Path:
    return layouts.write_stl10(tmp_path / "stl", [area_resize(square(one), 96) for one in windows], 22, 11)


def square(image: np.ndarray) -> np.ndarray:
    side = min(image.shape[:2])
    return image[:side, :side]


def stl10_file(folder: Path, name: str) -> list[bytes]:
    """Reads it like the Python code on the dataset's page."""
    everything = np.fromfile(folder / f"{name}_X.bin", np.uint8)
    images = np.transpose(np.reshape(everything, (-1, 3, 96, 96)), (0, 3, 2, 1))
    return [image.tobytes() for image in images]


def stl10_split(folder: Path, name: str) -> Expected:
    names = (folder / "class_names.txt").read_text().split()
    labels = np.fromfile(folder / f"{name}_y.bin", np.uint8)
    return {image: names[label - 1] for image, label in zip(stl10_file(folder, name), labels, strict=True)}


@pytest.mark.parametrize("form", ["folder", "parent", "archive"])
@pytest.mark.parametrize("unlabelled", [False, True])
def test_stl10(stl10: Path, windows: list[np.ndarray], form: str, unlabelled: bool) -> None:
    path = {"folder": stl10, "parent": stl10.parent}.get(form) or archive_of(stl10)
    train, test = stl10_split(stl10, "train"), stl10_split(stl10, "test")
    if unlabelled:
        train |= dict.fromkeys(stl10_file(stl10, "unlabeled"))
    if form == "archive":
        shutil.rmtree(stl10)
    source = opened("stl10", path, unlabelled=unlabelled)
    assert source.classes == layouts.STL10_CLASSES
    assert {split: len(images) for split, images in source.splits.items()} == {
        "train": 29 if unlabelled else 22,
        "test": 11,
    }
    assert found(source, "train") == train
    assert found(source, "test") == test
    assert (source.splits["train"].image(7, Decoder()) == area_resize(square(windows[7]), 96)).all()


def test_stl10_without_its_unlabelled_part_does_not_need_it(stl10: Path) -> None:
    before = opened("stl10", stl10).fingerprint
    (stl10 / "unlabeled_X.bin").unlink()
    assert opened("stl10", stl10).fingerprint == before


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train_X.bin", None, "has no train_X.bin; it must be stl10_binary.tar.gz or its folder"),
        ("class_names.txt", None, "has no class_names.txt"),
        ("unlabeled_X.bin", None, "has no unlabeled_X.bin"),
        ("class_names.txt", lambda content: b"", "class_names.txt has no class names"),
        ("test_X.bin", lambda content: content[:-100], "test_X.bin has 304028 bytes, not a multiple of 27648"),
        ("test_X.bin", lambda content: b"", "test_X.bin has 0 bytes"),
        ("test_y.bin", lambda content: content[:-1], "test_y.bin has 10 labels for 11 images"),
        ("train_y.bin", lambda content: b"\0" + content[1:], "train_y.bin has a label outside 1 to 10"),
        ("train_y.bin", lambda content: b"\x0b" + content[1:], "train_y.bin has a label outside 1 to 10"),
    ],
)
def test_errors_of_stl10_are_named(
    stl10: Path, name: str, change: Callable[[bytes], bytes] | None, message: str
) -> None:
    if change is None:
        (stl10 / name).unlink()
    else:
        (stl10 / name).write_bytes(change((stl10 / name).read_bytes()))
    for path in (stl10, archive_of(stl10)):
        with pytest.raises(ValueError, match=message):
            opened("stl10", path, unlabelled=True)


def test_a_damaged_archive_of_stl10_is_named(stl10: Path, tmp_path: Path) -> None:
    archive = archive_of(stl10)
    archive.write_bytes(archive.read_bytes()[:-20000])
    with pytest.raises(ValueError, match=r"stl10_binary.tar.gz is not a readable tar archive"):
        opened("stl10", archive, unlabelled=True)
    with pytest.raises(ValueError, match="nowhere does not exist"):
        opened("stl10", tmp_path / "nowhere")


def test_stl10_prepared(stl10: Path, prepare: Callable[..., Path]) -> None:
    splits: dict[str, Expected] = {}
    for name in ("train", "test"):
        labels = np.fromfile(stl10 / f"{name}_y.bin", np.uint8).astype(int) - 1
        images = [np.frombuffer(one, np.uint8).reshape(96, 96, 3) for one in stl10_file(stl10, name)]
        splits[name] = dict(zip(map(reduced, images), labels.tolist(), strict=True))
    archive = archive_of(stl10)
    check_shards(prepare("stl10", archive), splits, layouts.STL10_CLASSES)
    unlabelled = [np.frombuffer(one, np.uint8).reshape(96, 96, 3) for one in stl10_file(stl10, "unlabeled")]
    splits["train"] |= {reduced(one): -1 for one in unlabelled}
    check_shards(prepare("stl10", stl10, "--source.unlabelled", "true"), splits, layouts.STL10_CLASSES)
