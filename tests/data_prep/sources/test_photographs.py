import numpy as np
import pytest
from PIL import Image

from data_prep.config import SourceConfig
from data_prep.images.decode import Decoder
from data_prep.sources.open import open_source
from data_prep.sources.photographs import PHOTOGRAPHS, TRAIN_PART, Windows, draw_windows

COUNTS = {"train": 300, "valid": 50, "test": 60}
SPLITS = list(COUNTS)


def opened(**counts: int) -> dict[str, Windows]:
    splits = open_source(SourceConfig(kind="photographs", **counts)).splits
    assert all(isinstance(images, Windows) for images in splits.values())
    return splits  # type: ignore[return-value]


def test_windows_are_within_the_photograph_and_have_their_sizes() -> None:
    height, width = 300, 451
    for split, boxes in draw_windows(height, width, COUNTS, label=1).items():
        assert len(boxes) == COUNTS[split]
        assert boxes[:, :2].min() >= 0
        assert (boxes[:, 0] + boxes[:, 2]).max() <= width
        assert (boxes[:, 1] + boxes[:, 2]).max() <= height
        assert 64 <= boxes[:, 2].min() <= boxes[:, 2].max() <= 256


def test_no_pixel_of_any_photograph_is_in_two_splits() -> None:
    """Painted on the photograph, window by window."""
    splits = opened(train_per_class=300, valid_per_class=50, test_per_class=60)
    for label, file in enumerate(splits["train"].files):
        with Image.open(file) as image:
            width, height = image.size
        painted = {split: np.zeros((height, width), bool) for split in SPLITS}
        for split, images in splits.items():
            boxes = images.boxes[images.labels == label]
            assert len(boxes) == COUNTS[split]
            for left, top, side in boxes:
                painted[split][top : top + side, left : left + side] = True
        assert sum(mask.astype(int) for mask in painted.values()).max() == 1  # type: ignore[union-attr]
        assert not painted["train"][:, int(TRAIN_PART * width) :].any()
        assert not painted["valid"][height // 2 :].any()
        assert not painted["test"][: height // 2].any()


@pytest.mark.parametrize("split", SPLITS)
def test_a_window_is_that_part_of_the_photograph(split: str) -> None:
    images = opened(train_per_class=3, valid_per_class=3, test_per_class=3)[split]
    for index in range(len(images)):
        left, top, side = images.boxes[index]
        with Image.open(images.files[images.labels[index]]) as image:
            expected = image.convert("RGB").crop((left, top, left + side, top + side))
        assert (images.image(index, Decoder()) == np.asarray(expected)).all()


def test_a_scaled_decode_does_not_change_windows() -> None:
    images = opened(train_per_class=1, valid_per_class=1, test_per_class=1)["train"]
    for index in range(len(PHOTOGRAPHS)):
        assert (images.image(index, Decoder(64)) == images.image(index, Decoder())).all()


def test_photographs_are_balanced_and_always_the_same() -> None:
    counts = {"train_per_class": 5, "valid_per_class": 4, "test_per_class": 3}
    source = open_source(SourceConfig(kind="photographs", **counts))
    assert source.classes == list(PHOTOGRAPHS)
    assert list(source.splits) == SPLITS
    for split, images in source.splits.items():
        assert np.bincount(images.labels).tolist() == [counts[f"{split}_per_class"]] * len(PHOTOGRAPHS)
    first, second = opened(**counts), opened(**counts)
    assert all((first[split].boxes == second[split].boxes).all() for split in SPLITS)


def test_the_windows_are_those_of_earlier_versions() -> None:
    """They are the dataset: with other windows, measured results would not be comparable."""
    boxes = draw_windows(300, 451, {"train": 2, "valid": 1, "test": 1}, label=1)
    assert {split: found.tolist() for split, found in boxes.items()} == {
        "train": [[85, 104, 171], [23, 53, 75]],
        "valid": [[372, 25, 64]],
        "test": [[329, 172, 108]],
    }


def test_more_windows_of_one_split_do_not_change_the_others() -> None:
    few, many = (opened(train_per_class=5, valid_per_class=count, test_per_class=3) for count in (2, 40))
    for split in ("train", "test"):
        assert (few[split].boxes == many[split].boxes).all()


def test_the_fingerprint_depends_on_the_counts() -> None:
    configs = [
        SourceConfig(kind="photographs", train_per_class=train, valid_per_class=valid, test_per_class=test)
        for train, valid, test in ((5, 5, 5), (6, 5, 5), (5, 6, 5), (5, 5, 6))
    ]
    assert len({open_source(config).fingerprint for config in configs}) == len(configs)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.sources.photographs.find_spec", lambda package: None)
    with pytest.raises(ValueError, match=r"needs the package skimage; install requirements\.txt"):
        open_source(SourceConfig(kind="photographs"))
