"""Near-duplicates: images whose perceptual hashes and thumbnails are alike.

The hash is the 64-bit pHash: the signs of the lowest 8x8 frequencies of the image's luminance at 32x32. Images within
its Hamming distance are compared by the correlation of their 8x8 thumbnails in color, which rejects images of another
subject whose frequencies happen to agree. Both are computed from the central square, as shard sets store it, and the
hash with integers, so that it has the same bits on every processor.
"""

from dataclasses import dataclass

import numpy as np

from data_prep.images.crops import area_resize, center_square, sample
from data_prep.sources.base import Names

CORRELATION = 0.9
"""The smallest correlation of the thumbnails of near-duplicates."""
FLAT = 8.0
"""Images whose thumbnail has a smaller standard deviation, of 255, are flat: the hash of a blank page is noise."""
SIDE, LOW, THUMBNAIL = 32, 8, 8
"""Pixels a side that are hashed, frequencies a side that are in the hash, pixels a side of a thumbnail."""
SAMPLED = 256
"""Of larger images, this many pixels a side are read: 64 for each of the hashed ones."""
LUMINANCE = np.array([299, 587, 114])
COSINES = np.rint(4096 * np.cos(np.pi * np.arange(LOW)[:, None] * (2 * np.arange(SIDE) + 1) / (2 * SIDE))).astype(int)
"""The lowest rows of the discrete cosine transform, in integers: (LOW, SIDE)."""
MIRROR = 1 - 2 * (np.arange(LOW) % 2)
"""The sign of each horizontal frequency of the mirrored image."""


@dataclass(frozen=True)
class Look:
    """What of an image is compared."""

    frequencies: np.ndarray
    """int64 (LOW, LOW)."""
    thumbnail: np.ndarray
    """uint8 (THUMBNAIL, THUMBNAIL, 3)."""

    @property
    def code(self) -> np.uint64:
        """The perceptual hash."""
        values = self.frequencies.ravel()
        median = np.partition(values[1:], 31)[31]  # the first is the mean of the pixels
        return np.packbits(values > median).view("<u8")[0]

    @property
    def mirrored(self) -> "Look":
        return Look(self.frequencies * MIRROR, self.thumbnail[:, ::-1])

    @property
    def is_flat(self) -> bool:
        return float(self.thumbnail.std()) < FLAT


def look_of(image: np.ndarray) -> Look:
    """The look of an image uint8 (H, W, 3)."""
    square = center_square(image)
    square = area_resize(sample(square, SAMPLED) if len(square) > SAMPLED else square, SIDE)
    return Look(COSINES @ (square @ LUMINANCE) @ COSINES.T, area_resize(square, THUMBNAIL))


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
        """Which image `image` uint8 (H, W, 3) is a near-duplicate of, mirrored or not, as "of NAME, 3 of 64 bits
        differ"; None if it is of none."""
        look = look_of(image)
        if look.is_flat:
            return None
        found = min([*self._near(look), *self._near(look.mirrored)], default=None)
        return None if found is None else f"of {self.names[found[1]]}, {found[0]} of 64 bits differ"

    def _near(self, look: Look) -> list[tuple[int, int]]:
        """(distance, index) of all near-duplicates."""
        distances = np.bitwise_count(self.codes ^ look.code)
        near = np.flatnonzero(distances <= self.distance)
        if len(near):
            near = near[_correlations(self.thumbnails[near], look.thumbnail.ravel()) >= CORRELATION]
        return list(zip(distances[near].tolist(), near.tolist(), strict=True))


def _correlations(many: np.ndarray, one: np.ndarray) -> np.ndarray:
    """Of thumbnails (n, 192) that are not flat with another (192,): float64 (n,)."""
    centered = many - many.mean(axis=1, keepdims=True)
    wanted = one - one.mean()
    return centered @ wanted / (np.linalg.norm(centered, axis=1) * np.linalg.norm(wanted))
