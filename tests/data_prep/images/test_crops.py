from fractions import Fraction

import numpy as np
import pytest

from data_prep.images.crops import EVALUATION, Cropper, ImageViews, area_resize, evaluation_view
from data_prep.sources.base import ImageArray, Source


def make_cropper(**changes: object) -> Cropper:
    return Cropper(**{"split": "train", "seed": 0, "resolution": 16, "random_crop": "auto", **changes})  # type: ignore[arg-type]


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def exact_area_average(square: np.ndarray, resolution: int) -> np.ndarray:
    """Every pixel repeated until the sides divide, then plain means of blocks, in float64."""
    repeats = Fraction(resolution, square.shape[0]).numerator
    large = square.repeat(repeats, 0).repeat(repeats, 1).astype(np.float64)
    block = large.shape[0] // resolution
    return large.reshape(resolution, block, resolution, block, 3).mean(axis=(1, 3))


@pytest.mark.parametrize("side", [24, 32, 36, 100, 225])
def test_area_resize_is_the_mean_of_the_covered_area(side: int) -> None:
    square = noise(side, side)
    assert np.abs(area_resize(square, 16) - exact_area_average(square, 16)).max() <= 0.51


def test_an_image_at_the_resolution_is_unchanged() -> None:
    image = noise(16, 16)
    assert (make_cropper().crop(image, 0, 0) == image).all()
    assert (make_cropper().crop(image, 0, EVALUATION) == image).all()


def test_evaluation_shows_the_center_crop() -> None:
    image = np.zeros((40, 64, 3), np.uint8)
    image[:, 12:52] = 200
    assert (evaluation_view(image, 8) == 200).all()


def test_training_crops_have_the_papers_size_and_cover_the_image() -> None:
    """Shorter side to s in [256, 384], crop of 224: the crop has 224/s of the shorter side."""
    height, width = 300, 400
    ramp = np.zeros((height, width, 3), np.float64)
    ramp[..., 0], ramp[..., 1] = np.arange(width) * 255 / width, np.arange(height)[:, None] * 255 / height
    image = ramp.astype(np.uint8)
    crops = np.stack([make_cropper().crop(image, index, 0) for index in range(400)]).astype(float)
    span = (crops[:, 8, -1, 0] - crops[:, 8, 0, 0]) * 16 / 15 * width / 255 / height  # as part of the shorter side
    assert 224 / 384 - 0.02 < span.min() < 0.61
    assert 0.85 < span.max() < 224 / 256 + 0.02
    left = crops[:, 8, 0, 0] * width / 255
    assert left.min() < 15
    assert (crops[:, 8, -1, 0] * width / 255).max() > width - 20


def test_a_view_depends_on_seed_split_image_and_number_alone() -> None:
    image = noise(200, 200)
    base = make_cropper().crop(image, 3, 0)
    assert (make_cropper().crop(image, 3, 0) == base).all()
    for other in (make_cropper(seed=1).crop(image, 3, 0), make_cropper(split="valid").crop(image, 3, 0)):
        assert (other != base).any()
    assert (make_cropper().crop(image, 4, 0) != base).any()
    assert (make_cropper().crop(image, 3, 1) != base).any()


@pytest.mark.parametrize(
    ("random_crop", "side", "cropped"),
    [("auto", 127, False), ("auto", 128, True), ("always", 64, True), ("never", 500, False)],
)
def test_which_images_are_cropped(random_crop: str, side: int, cropped: bool) -> None:
    image = noise(side, side)
    view = make_cropper(random_crop=random_crop).crop(image, 0, 0)
    assert (view != evaluation_view(image, 16)).any() == cropped


def test_views_of_images_in_any_order() -> None:
    source = Source("noise", [], {}, {}, "")
    views = ImageViews(ImageArray(np.stack([noise(20, 20)] * 3), np.arange(3)), make_cropper(resolution=10), source)
    assert views.view(2, EVALUATION).shape == (10, 10, 3)
