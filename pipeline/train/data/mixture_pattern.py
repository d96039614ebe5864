"""Which shard set each image of a mixture comes from: a pure function of (seed, weights, position).

The pattern repeats after 1,000 images, so that any 1,000 consecutive images have the exact proportions. Weights that
are not multiples of 1/1,000 are rounded to millionths: then each block of 1,000 images has the nearest whole numbers,
which alternate between blocks so that 1,000,000 images are exact. Counts up to any position are computed, not counted.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import gcd, lcm

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
    """The sets of an endless sequence of images, by their positions in the run."""

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
        self._residues = lru_cache(maxsize=64)(self._new_residues)
        self._own_places = lru_cache(maxsize=16)(self._new_own_places)

    def at(self, position: int, count: int) -> np.ndarray:
        """The number of the set of each image at positions [position, position + count)."""
        return self._sets[np.arange(position, position + count) % self.period]

    def count(self, number: int, position: int) -> int:
        """How many of the first `position` images are of a set."""
        periods, rest = divmod(position, self.period)
        places = self._places[number]
        return periods * len(places) + int(np.searchsorted(places, rest))

    def in_lane(self, number: int, images: int, lane: int, lanes: int) -> int:
        """How many of the first `images` images of a set are at positions that are `lane` modulo `lanes`."""
        periods, rest = divmod(images, len(self._places[number]))
        cycle, residues = lcm(self.period, lanes) // self.period, self._residues(number, lanes)
        cycles, periods = divmod(periods, cycle)
        own = self._own_places(number, periods * self.period % lanes, lane, lanes)
        before = cycles * self._shifted(residues, lane, cycle) + self._shifted(residues, lane, periods)
        return before + int(np.searchsorted(own, rest))

    def by_lane(self, number: int, first: int, stop: int, lanes: int) -> np.ndarray:
        """int64 (lanes,): of a set's images [first, stop), how many are at positions of each residue modulo `lanes`."""
        return self._up_to(number, stop, lanes) - self._up_to(number, first, lanes)

    def meets(self, number: int, lane: int, lanes: int) -> bool:
        """Whether any image of a set is at a position that is `lane` modulo `lanes`."""
        return bool(self._shifted(self._residues(number, lanes), lane, lcm(self.period, lanes) // self.period))

    def _up_to(self, number: int, images: int, lanes: int) -> np.ndarray:
        """int64 (lanes,): `in_lane` of all lanes."""
        places, residues = self._places[number], self._residues(number, lanes)
        periods, rest = divmod(images, len(places))
        cycles, periods = divmod(periods, lcm(self.period, lanes) // self.period)
        found = np.bincount((places[:rest] + periods * self.period) % lanes, minlength=lanes)
        for period in range(periods):
            found += np.roll(residues, period * self.period % lanes)
        if cycles:  # in a cycle, the places of a lane are those of all lanes that differ by multiples of this
            found += cycles * np.resize(residues.reshape(-1, gcd(self.period, lanes)).sum(0), lanes)
        return found

    def _shifted(self, residues: np.ndarray, lane: int, periods: int) -> int:
        """How many images of a set are in a lane in the first periods; residues: `_residues`."""
        return int(residues[(lane - np.arange(periods) * self.period) % len(residues)].sum())

    def _new_residues(self, number: int, lanes: int) -> np.ndarray:
        """int64 (lanes,): a set's places in the first period, by their residue modulo `lanes`."""
        return np.bincount(self._places[number] % lanes, minlength=lanes)

    def _new_own_places(self, number: int, shift: int, lane: int, lanes: int) -> np.ndarray:
        """Which images of a set are in a lane, in a period that begins at a position that is `shift` modulo `lanes`."""
        return np.flatnonzero((self._places[number] + shift) % lanes == lane).astype(np.int32)


@lru_cache(maxsize=16)
def pattern_of(seed: int, parts: tuple[int, ...]) -> Pattern:
    """The pattern of these sets; one of weights that are not multiples of 1/1,000 takes 10 MB."""
    return Pattern(seed, parts)
