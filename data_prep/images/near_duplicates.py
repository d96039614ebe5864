"""Near-duplicates: images whose perceptual hashes and thumbnails are alike.

The hash is the 64-bit pHash: the signs of the lowest 8x8 frequencies of the image's luminance at 32x32. Images that
pass its Hamming distance are compared by the correlation of their 8x8 thumbnails in color, which rejects images of
another subject whose frequencies happen to agree. Both are computed from the central square, as shard sets store it.
"""

from dataclasses import dataclass

import numpy as np

from data_prep.images.crops import evaluation_view
from data_prep.sources.base import Names

CORRELATION = 0.9
"""The smallest correlation of the thumbnails of near-duplicates."""
FLAT = 8.0
"""Images whose thumbnail has a smaller standard deviation, of 255, are flat: the hash of a blank page is noise."""
SIDE, LOW, THUMBNAIL = 32, 8, 8
"""Pixels a side that are hashed, frequencies a side that are kept, pixels a side of a thumbnail."""
LUMINANCE = np.array([0.299, 0.587, 0.114])
COSINES = np.cos(np.pi * np.arange(LOW)[:, None] * (2 * np.arange(SIDE) + 1) / (2 * SIDE))
"""The lowest rows of the discrete cosine transform: (LOW, SIDE)."""


@dataclass(frozen=True)
class Look:
    """What of an image is compared."""

    code: np.uint64
    """The perceptual hash."""
    thumbnail: np.ndarray
    """uint8 (192,)."""

    @property
    def is_flat(self) -> bool:
        return float(self.thumbnail.std()) < FLAT


def look_of(image: np.ndarray) -> Look:
    """The hash and the thumbnail of an image uint8 (H, W, 3)."""
    return _look(evaluation_view(image, SIDE))


def _look(square: np.ndarray) -> Look:
    frequencies = (COSINES @ (square @ LUMINANCE) @ COSINES.T).ravel()
    bits = frequencies > np.median(frequencies[1:])  # the first is the mean, which would pull the median
    blocks = square.reshape(THUMBNAIL, SIDE // THUMBNAIL, THUMBNAIL, SIDE // THUMBNAIL, 3)
    thumbnail = np.rint(blocks.mean((1, 3), np.float32)).astype(np.uint8)
    return Look(np.packbits(bits).view("<u8")[0], thumbnail.ravel())


@dataclass(frozen=True)
class NearDuplicates:
    """Images to recognize, in any number of sets. A search compares with all of them, so it is exact."""

    codes: np.ndarray
    """uint64 (N,)."""
    thumbnails: np.ndarray
    """uint8 (N, 192)."""
    names: Names
    """For messages (N)."""
    distance: int
    """Bits by which the hash of a near-duplicate may differ."""

    def match(self, image: np.ndarray) -> str | None:
        """The name of the nearest image of which `image` uint8 (H, W, 3) is a near-duplicate, mirrored or not, with the
        distance; None if there is none. Takes 2 us for each 1,000 images."""
        square = evaluation_view(image, SIDE)
        found = [nearest for flipped in (square, square[:, ::-1]) if (nearest := self._nearest(_look(flipped)))]
        if not found:
            return None
        distance, index = min(found)
        return f"of {self.names[index]}, {distance} of 64 bits differ"

    def _nearest(self, look: Look) -> tuple[int, int] | None:
        """(distance, index), the lowest of both."""
        if look.is_flat:
            return None
        distances = np.bitwise_count(self.codes ^ look.code)
        near = np.flatnonzero(distances <= self.distance)
        near = near[_correlations(self.thumbnails[near], look.thumbnail) >= CORRELATION]
        return min(zip(distances[near].tolist(), near.tolist(), strict=True), default=None)


def _correlations(many: np.ndarray, one: np.ndarray) -> np.ndarray:
    """Of thumbnails (n, 192) that are not flat with another (192,): float64 (n,)."""
    centered = many - many.mean(axis=1, keepdims=True)
    wanted = one - one.mean()
    return centered @ wanted / (np.linalg.norm(centered, axis=1) * np.linalg.norm(wanted))
