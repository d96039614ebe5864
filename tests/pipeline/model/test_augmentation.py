"""Mirrors and crops on the token grid, against numpy's own padding, image by image."""

import numpy as np
import pytest

from pipeline.config import DataConfig, ModelConfig, TrainConfig
from pipeline.model.augmentation import Augmentation, Changes, mirror


def by_numpy(tokens: np.ndarray, changes: Changes, padding: int, resolution: int) -> np.ndarray:
    """One image after the other: pad, crop, flip."""
    images = []
    for image, mirrored, (top, left) in zip(tokens, changes.mirrored, changes.corners, strict=True):
        padded = np.pad(image.reshape(resolution, resolution), padding, mode="reflect")
        cut = padded[top : top + resolution, left : left + resolution]
        images.append((cut[:, ::-1] if mirrored else cut).ravel())
    return np.array(images)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("resolution", "padding"), [(32, 4), (8, 7), (8, 1), (5, 2), (2, 1)])
def test_crops_are_those_of_numpy(resolution: int, padding: int, flip: bool) -> None:
    random = np.random.default_rng(0)
    tokens = random.integers(0, 65_535, (300, resolution**2)).astype(np.uint16)
    augmentation = Augmentation(flip, padding)
    changes = augmentation.draw(random, len(tokens))
    assert changes.corners.min() == 0
    assert changes.corners.max() == 2 * padding
    assert changes.mirrored.any() == flip
    changed = augmentation.apply(tokens, changes, resolution)
    assert np.array_equal(changed, by_numpy(tokens, changes, padding, resolution))
    assert changed.dtype == np.uint16


def test_nothing_is_changed_unless_it_is_asked_for() -> None:
    tokens = np.arange(4 * 16, dtype=np.uint16).reshape(4, 16)
    random = np.random.default_rng(0)
    assert np.array_equal(Augmentation().apply(tokens, Augmentation().draw(random, 4), 4), tokens)
    assert random.random() == np.random.default_rng(0).random()


def test_mirror_flips_the_chosen_images_on_the_grid() -> None:
    tokens = np.arange(2 * 16, dtype=np.uint16).reshape(2, 16)
    turned = mirror(tokens, np.array([False, True]), 4)
    assert np.array_equal(turned[0], tokens[0])
    assert np.array_equal(turned[1].reshape(4, 4), np.fliplr(tokens[1].reshape(4, 4)))


@pytest.mark.parametrize(
    ("crop", "message"), [(-1, "data.reflect_crop is -1"), (8, "data.reflect_crop is 8; it must be below")]
)
def test_a_padding_that_has_no_reflection(crop: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(model=ModelConfig(layers=1, width=8, heads=1, resolution=8), data=DataConfig(reflect_crop=crop))
