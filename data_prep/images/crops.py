"""A picture to (R, R, 3) uint8: the paper's training and evaluation views, reduced by exact area averages.

The paper resizes the shorter side to a random number of pixels in [256, 384], cuts a random square of 224
(for evaluation: shorter side 224, centre square), and reduces that to the model's resolution R. Resizing
first and cutting afterwards shows the same part of the picture as cutting a square of 224/s of the shorter
side out of the original, so one resize does: from the cut square straight to R, each output pixel the mean
of the area it covers. Two resizes would only blur.
"""

import math
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Literal

import numpy as np

from data_prep.common.seeding import generator
from data_prep.config import DataConfig
from data_prep.images.decode import Decoder
from data_prep.sources.base import Images, Source

EVALUATION = -1
"""The number of the evaluation view; training views count from 0."""
SHORTER_SIDE = (256, 384)
CROP = 224
WHOLE_BELOW = 128
"""`random_crop: auto` takes pictures whose shorter side is below this many pixels whole."""
SCALED_OVER = 2
"""`scaled_decode` leaves the cut square at least so many times as large as the view."""


@dataclass(frozen=True)
class Cutter:
    """Cuts the views of one split's pictures; each is a function of (seed, split, place, number)."""

    split: str
    seed: int
    resolution: int
    random_crop: Literal["auto", "always", "never"]
    scaled_decode: bool = False

    def decoder(self, *numbers: int) -> Decoder:
        """Decodes pictures well enough for the views of these numbers."""
        if not self.scaled_decode:
            return Decoder()
        side = SCALED_OVER * self.resolution
        if self.random_crop == "never" or all(number == EVALUATION for number in numbers):
            return Decoder(side)
        # The smallest cut must be large enough, and no picture may shrink to one that is taken whole.
        return Decoder(max(WHOLE_BELOW, math.ceil(side * SHORTER_SIDE[1] / CROP)))

    def cut(self, picture: np.ndarray, number: int, *place: int) -> np.ndarray:
        """View `number` (or EVALUATION) of a picture uint8 (H, W, 3): (R, R, 3).

        place: what tells the picture from all others of the split: its index, or its piece and place in it.
        """
        smallest = {"auto": WHOLE_BELOW, "always": 0, "never": max(picture.shape) + 1}[self.random_crop]
        if number == EVALUATION or min(picture.shape[:2]) < smallest:
            return evaluation_view(picture, self.resolution)
        return training_view(picture, self.resolution, generator(self.seed, "view", self.split, *place, number))


class ImageViews:
    """The views of one split's pictures, cut when asked for."""

    def __init__(self, pictures: Images, cutter: Cutter, source: str) -> None:
        """source: its name, for messages."""
        self.pictures, self.labels, self.cutter, self.source = pictures, pictures.labels, cutter, source

    def view(self, index: int, number: int) -> np.ndarray:
        """View `number` (or EVALUATION) of picture `index`: uint8 (R, R, 3). Raises BadImage; ValueError by shape."""
        picture = self.pictures.image(index, self.cutter.decoder(number))
        if picture.dtype != np.uint8 or picture.shape[2:] != (3,) or not picture.size:
            raise ValueError(
                f"{self.source} gives image {index} of {self.cutter.split} as {picture.dtype} {picture.shape}; it must "
                f"be uint8 (height, width, 3)."
            )
        return self.cutter.cut(picture, number, index)


def cutter(source: Source, config: DataConfig, split: str) -> Cutter:
    """Cuts the views of one of the source's splits."""
    views = config.views
    random_crop = "never" if views.random_crop == "auto" and source.cropped else views.random_crop
    return Cutter(split, config.seed, config.resolution, random_crop, views.scaled_decode)


def views_of(source: Source, config: DataConfig, split: str) -> ImageViews:
    """The views of one of the source's splits that is no stream."""
    return ImageViews(source.splits[split], cutter(source, config, split), source.name)


def evaluation_view(picture: np.ndarray, resolution: int) -> np.ndarray:
    """The largest centred square of a picture uint8 (H, W, 3), as (R, R, 3)."""
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return area_resize(picture[top : top + side, left : left + side], resolution)


def training_view(picture: np.ndarray, resolution: int, random: np.random.Generator) -> np.ndarray:
    """A random square of 58% to 88% of the shorter side of a picture uint8 (H, W, 3), as (R, R, 3)."""
    height, width = picture.shape[:2]
    shorter_side = int(random.integers(SHORTER_SIDE[0], SHORTER_SIDE[1] + 1))
    side = max(1, round(min(height, width) * CROP / shorter_side))
    top = int(random.integers(0, height - side + 1))
    left = int(random.integers(0, width - side + 1))
    return area_resize(picture[top : top + side, left : left + side], resolution)


def area_resize(square: np.ndarray, resolution: int) -> np.ndarray:
    """A square uint8 (S, S, 3) to (R, R, 3), by area averages; a smaller one is enlarged bilinearly."""
    if square.shape[0] == resolution:
        return np.ascontiguousarray(square)
    opencv = _opencv()
    return opencv.resize(np.ascontiguousarray(square), (resolution, resolution), interpolation=opencv.INTER_AREA)


@cache
def _opencv() -> ModuleType:
    """OpenCV without threads of its own: pictures are spread over processes already, which are forked."""
    import cv2

    cv2.setNumThreads(1)
    return cv2
