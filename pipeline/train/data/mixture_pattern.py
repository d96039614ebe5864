"""Which shard set each image of a mixture comes from: a pure function of (seed, weights, offset).

The pattern repeats after 1,000 images, so that any 1,000 consecutive images have the exact proportions. Weights that
are not multiples of 1/1,000 are rounded to millionths: then each block of 1,000 images has the nearest whole numbers,
which alternate between blocks so that 1,000,000 images are exact. Counts up to any offset are computed, not counted.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import lcm

import numpy as np

from data_prep.common.seeding import generator
from pipeline.config import WEIGHT_PARTS

BLOCK = 1000
"""Images after which the proportions are met again."""
STRIDE = 369
"""Of the numbers coprime to 1,000 the one that spreads the extra images of a set most evenly over the blocks: after any
number of blocks a set is within 4 images of its exact share."""


def weight_parts(weights: Sequence[float]) -> list[int]:
    """Weights that add up to 1, as whole millionths that add up to a million, by largest remainder."""
    exact = np.array(weights, np.float64) * WEIGHT_PARTS
    parts = np.floor(exact + 1e-4).astype(np.int64)  # 0.7 * 1e6 is 699999.9999999999
    largest = np.argsort(parts - exact, kind="stable")[: WEIGHT_PARTS - parts.sum()]
    parts[largest] += 1
    return [int(part) for part in parts]


class Pattern:
    """The sets of an endless sequence of images, by offset from its first image."""

    def __init__(self, seed: int, parts: Sequence[int]) -> None:
        """parts: for each set its millionths of the images, as of `weight_parts`."""
        quotas, rest = np.divmod(np.array(parts, np.int64), BLOCK)
        extras = int(rest.sum()) // BLOCK
        count = len(parts)
        slots = np.repeat(np.arange(count + extras), [*quotas, *[1] * extras])
        slots = generator(seed, "mixture", *parts).permutation(slots)
        self._sets = slots.astype(np.uint16)
        if extras:
            # Extra slot j of block b goes to the set in whose stretch of a line, rest images long, the point falls.
            blocks = np.tile(slots, (BLOCK, 1))
            points = np.arange(BLOCK) * STRIDE % BLOCK
            for extra in range(extras):
                chosen = np.searchsorted(np.cumsum(rest), points + extra * BLOCK, side="right")
                blocks[:, np.flatnonzero(slots == count + extra)[0]] = chosen
            self._sets = blocks.reshape(-1).astype(np.uint16)
        self.period = len(self._sets)
        self._places = [np.flatnonzero(self._sets == number) for number in range(count)]
        self._lane_places = lru_cache(maxsize=4096)(self._new_lane_places)

    def at(self, offset: int, count: int) -> np.ndarray:
        """The number of the set of each image at offsets [offset, offset + count)."""
        return self._sets[np.arange(offset, offset + count) % self.period]

    def count(self, number: int, offset: int) -> int:
        """How many of the first `offset` images are of a set."""
        periods, rest = divmod(offset, self.period)
        places = self._places[number]
        return periods * len(places) + int(np.searchsorted(places, rest))

    def in_lane(self, number: int, images: int, lane: int, lanes: int) -> int:
        """How many of the first `images` images of a set are at offsets that are `lane` modulo `lanes`."""
        own, every = self._lane_places(number, lane, lanes)
        periods, rest = divmod(images, every)
        return periods * len(own) + int(np.searchsorted(own, rest))

    def by_lane(self, number: int, first: int, stop: int, lanes: int) -> np.ndarray:
        """int64 (lanes,): of a set's images [first, stop), how many are in each lane."""
        at = [
            self.in_lane(number, stop, lane, lanes) - self.in_lane(number, first, lane, lanes) for lane in range(lanes)
        ]
        return np.array(at, np.int64)

    def _new_lane_places(self, number: int, lane: int, lanes: int) -> tuple[np.ndarray, int]:
        """Which images of a set are in a lane, and after how many of its images this repeats."""
        places = self._places[number]
        periods = lcm(self.period, lanes) // self.period
        found = []
        for period in range(periods):
            inside = np.flatnonzero((places + period * self.period) % lanes == lane)
            found.append(inside + period * len(places))
        return np.concatenate(found).astype(np.int32), periods * len(places)
