"""An image to (R, R, 3) uint8: the paper's training and evaluation views, resized by exact area averages.

The paper resizes the shorter side to a random number of pixels s in [256, 384], crops a random square of 224
(for evaluation: shorter side 224, center crop), and resizes that to the model's resolution R. A crop of 224/s of the
shorter side of the original shows the same part of the image. So one resize is enough: from this crop to R, where
each output pixel is the mean of the area that it covers. A second resize would only blur.
"""

import math
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Literal

import numpy as np

from data_prep.common.seeding import generator
from data_prep.config import DataConfig
from data_prep.images.decode import BadImage, Decoder
from data_prep.sources.base import Images, Source

EVALUATION = -1
"""The number of the evaluation view; training views are numbered from 0."""
SHORTER_SIDE = (256, 384)
CROP = 224
NO_CROP_BELOW = 128
"""`random_crop: auto` does not crop images whose shorter side has fewer pixels."""
SCALED_DECODE_MARGIN = 2
"""With `scaled_decode`, the decoded crop is at least this many times as large as the view."""


@dataclass(frozen=True)
class Cropper:
    """Crops the views of one split's images; each is a function of (seed, split, position, number)."""

    split: str
    seed: int
    resolution: int
    random_crop: Literal["auto", "always", "never"]
    scaled_decode: bool = False

    def decoder(self, *numbers: int) -> Decoder:
        """The decoder with the resolution that the views of these numbers need."""
        if not self.scaled_decode:
            return Decoder()
        side = SCALED_DECODE_MARGIN * self.resolution
        if self.random_crop == "never" or all(number == EVALUATION for number in numbers):
            return Decoder(side)
        # The smallest crop must be large enough, and no image may shrink below NO_CROP_BELOW.
        return Decoder(max(NO_CROP_BELOW, math.ceil(side * SHORTER_SIDE[1] / CROP)))

    def crop(self, image: np.ndarray, number: int, *position: int) -> np.ndarray:
        """View `number` (or EVALUATION) of an image uint8 (H, W, 3): (R, R, 3).

        position: identifies the image within the split: its index, or its stream and its position in the stream.
        """
        smallest = {"auto": NO_CROP_BELOW, "always": 0, "never": max(image.shape) + 1}[self.random_crop]
        if number == EVALUATION or min(image.shape[:2]) < smallest:
            return evaluation_view(image, self.resolution)
        return training_view(image, self.resolution, generator(self.seed, "view", self.split, *position, number))


class ImageViews:
    """The views of one split's images, cropped on demand."""

    def __init__(self, images: Images, cropper: Cropper, source: Source) -> None:
        self.images, self.labels, self.cropper, self.source = images, images.labels, cropper, source

    def view(self, index: int, number: int) -> np.ndarray:
        """View `number` (or EVALUATION) of image `index`: uint8 (R, R, 3).

        Raises BadImage for an image that can't be used or is a near-duplicate, and ValueError if the source returns
        another type or shape.
        """
        image = self.images.image(index, self.cropper.decoder(number))
        if image.dtype != np.uint8 or image.shape[2:] != (3,) or not image.size:
            raise ValueError(
                f"{self.source.name} returns image {index} of {self.cropper.split} as {image.dtype} {image.shape}; it "
                f"must be uint8 (height, width, 3)."
            )
        if original := self.source.original_of(image, self.cropper.split):
            raise BadImage(self.images.name(index), "near-duplicate", original)
        return self.cropper.crop(image, number, index)


def make_cropper(source: Source, config: DataConfig, split: str) -> Cropper:
    """Crops the views of one of the source's splits."""
    views = config.views
    random_crop = "never" if views.random_crop == "auto" and source.cropped else views.random_crop
    return Cropper(split, config.seed, config.resolution, random_crop, views.scaled_decode)


def views_of(source: Source, config: DataConfig, split: str) -> ImageViews:
    """The views of one of the source's splits that has random access."""
    return ImageViews(source.splits[split], make_cropper(source, config, split), source)


def evaluation_view(image: np.ndarray, resolution: int) -> np.ndarray:
    """The center crop, as large as possible, of an image uint8 (H, W, 3), as (R, R, 3)."""
    return area_resize(center_square(image), resolution)


def center_square(image: np.ndarray) -> np.ndarray:
    """The center crop, as large as possible, of an image uint8 (H, W, 3): a view (S, S, 3)."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]


def sample(square: np.ndarray, side: int) -> np.ndarray:
    """Evenly spaced pixels of a square uint8 (S, S, 3): (side, side, 3). Much faster than averages."""
    opencv = _opencv()
    return opencv.resize(np.ascontiguousarray(square), (side, side), interpolation=opencv.INTER_NEAREST_EXACT)


def training_view(image: np.ndarray, resolution: int, random: np.random.Generator) -> np.ndarray:
    """A random square crop of 58% to 88% of the shorter side of an image uint8 (H, W, 3), as (R, R, 3)."""
    height, width = image.shape[:2]
    shorter_side = int(random.integers(SHORTER_SIDE[0], SHORTER_SIDE[1] + 1))
    side = max(1, round(min(height, width) * CROP / shorter_side))
    top = int(random.integers(0, height - side + 1))
    left = int(random.integers(0, width - side + 1))
    return area_resize(image[top : top + side, left : left + side], resolution)


def area_resize(square: np.ndarray, resolution: int) -> np.ndarray:
    """A square uint8 (S, S, 3) to (R, R, 3), by area averages; enlarged bilinearly if S < R."""
    if square.shape[0] == resolution:
        return np.ascontiguousarray(square)
    opencv = _opencv()
    return opencv.resize(np.ascontiguousarray(square), (resolution, resolution), interpolation=opencv.INTER_AREA)


@cache
def _opencv() -> ModuleType:
    """OpenCV without threads of its own: the images are already distributed over forked processes."""
    import cv2

    cv2.setNumThreads(1)
    return cv2
