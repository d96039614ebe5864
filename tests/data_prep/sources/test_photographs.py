from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.build.build import prepare_shards
from data_prep.build.parts import Part
from data_prep.config import DataConfig, PaletteConfig, SourceConfig
from data_prep.images.decode import Decoder
from data_prep.shards.reader import open_shard_set
from data_prep.sources.open import open_source
from data_prep.sources.photographs import (
    GRID,
    PHOTOGRAPHS,
    TRAIN_PART,
    Windows,
    draw_in_cells,
    draw_windows,
    equalized,
)

COUNTS = {"train": 300, "valid": 50, "test": 60}
SPLITS = list(COUNTS)
FINGERPRINT = "f6f08ea94ed7423372c0da466d6e42dd60abc0b1bbc9c30fe9f21b146f4ab9de"
"""Of the source with its default options, before it had windows of a grid and equalized ones."""


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


def test_each_row_and_column_of_the_grid_has_cells_of_every_split() -> None:
    for line in [*GRID, *zip(*GRID, strict=True)]:
        assert sorted(line) == ["test", "train", "train", "valid"]


def test_windows_of_a_grid_are_within_the_cells_of_their_split() -> None:
    """Painted on the photograph, window by window; the sizes are those of the cat, the smallest photograph."""
    height, width = 300, 451
    painted = {}
    for split, boxes in draw_in_cells(height, width, COUNTS, label=1).items():
        assert boxes.shape == (COUNTS[split], 3)
        assert 48 <= boxes[:, 2].min() < boxes[:, 2].max() <= height // 4
        painted[split] = np.zeros((height, width), bool)
        for left, top, side in boxes:
            painted[split][top : top + side, left : left + side] = True
        for row, column in np.ndindex(4, 4):
            cell = painted[split][row * 75 : row * 75 + 75, column * 112 : column * 112 + 112]
            assert cell.any() == (GRID[row][column] == split)
    assert sum(mask.astype(int) for mask in painted.values()).max() == 1  # type: ignore[union-attr]


def test_more_windows_of_one_split_do_not_change_the_others_of_a_grid() -> None:
    few, many = (draw_in_cells(300, 451, COUNTS | {"valid": count}, label=1) for count in (2, 40))
    for split in ("train", "test"):
        assert (few[split] == many[split]).all()


def test_equalized_windows_keep_the_order_of_brightness_and_have_every_gray_once() -> None:
    window = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    window[0, :2] = window[0, 0]  # equally bright: ranked in reading order
    grays = equalized(window)
    assert (grays == grays[..., :1]).all()
    gray = grays[..., 0].ravel()
    assert np.unique(gray).tolist() == list(range(256))
    assert gray[1] == gray[0] + 1
    luminance = window.reshape(-1, 3) @ np.array([0.299, 0.587, 0.114])
    brighter = luminance[:, None] > luminance + 1e-9
    assert (gray[:, None] > gray)[brighter].all()


def test_equalized_windows_of_another_size_have_every_gray_equally_often() -> None:
    window = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert (np.bincount(equalized(window)[..., 0].ravel(), minlength=256) == 4).all()


def test_color_statistics_of_equalized_windows_tell_nothing_about_their_class(tmp_path: Path) -> None:
    """As stored: all images have one histogram. The bytes do not depend on the number of workers."""
    counts = {"train_per_class": 3, "valid_per_class": 1, "test_per_class": 1}
    source = SourceConfig(kind="photographs", regions="grid", equalized_side=16, **counts)
    digests = []
    for workers in (1, 2):
        config = DataConfig(source=source, resolution=16, palette=PaletteConfig(colors=32), workers=workers)
        prepare_shards(config, tmp_path / str(workers), Part())
        digests.append(open_shard_set(tmp_path / str(workers)).digest)
    assert digests[0] == digests[1]
    for split in SPLITS:
        tokens, labels = open_shard_set(tmp_path / "1").split(split).record(0)
        histograms = [np.bincount(image, minlength=32).tolist() for image in tokens]
        assert len(set(labels.tolist())) == 10
        assert all(histogram == histograms[0] for histogram in histograms)


def test_the_options_of_equalized_grids_change_no_other_set() -> None:
    """A set that was prepared before they existed is found finished: its options and its source are the same."""
    default = SourceConfig(kind="photographs")
    assert open_source(default).fingerprint == FINGERPRINT
    values = DataConfig(source=default).to_dict()
    assert "regions" not in values["source"]
    assert "equalized_side" not in values["source"]
    changed = DataConfig(source=SourceConfig(kind="photographs", regions="grid", equalized_side=16), resolution=16)
    assert DataConfig.from_dict(changed.to_dict()) == changed
    fingerprints = {
        open_source(SourceConfig(kind="photographs", regions=regions, equalized_side=side)).fingerprint
        for regions in ("sides", "grid")
        for side in (0, 16)
    }
    assert len(fingerprints) == 4


def test_equalized_windows_must_have_the_resolution() -> None:
    source = SourceConfig(kind="photographs", equalized_side=16)
    with pytest.raises(ValueError, match=r"source\.equalized_side is 16, but resolution is 32; set both to the same"):
        DataConfig(source=source)
