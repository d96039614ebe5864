"""Which pictures a shard set holds, in which splits, order and shards: a function of the source and the seed.

A unit of work is prepared alone and in any order. A split whose images can be read in any order is shuffled as a
whole, and a unit is one shard of it. A split that is a stream comes in pieces of unknown length; a unit
is a piece, shuffled in blocks, and what it gives is one shard of train and one of valid.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_prep.common.seeding import generator
from data_prep.config import DataConfig
from data_prep.images.crops import EVALUATION
from data_prep.shards.format import IMAGES_PER_RECORD, RECORDS_PER_SHARD, shard_name
from data_prep.sources.base import Source

IMAGES_PER_SHARD = IMAGES_PER_RECORD * RECORDS_PER_SHARD


class Unit(NamedTuple):
    """One piece of the work."""

    split: str
    """Of the shard set; for a stream, of the source."""
    number: int

    @property
    def name(self) -> str:
        return shard_name(*self).removesuffix(".tar")


@dataclass(frozen=True)
class SplitPlan:
    """The images of one split of the shard set, in file order, where the source can be read in any order."""

    source_split: str
    """The split of the source they come from: `train` for the validation images that are held out of it."""
    pictures: np.ndarray
    """int64 (N,): the picture's number in the source's split."""
    views: np.ndarray
    """int64 (N,): the number of its view, or EVALUATION."""

    @property
    def shards(self) -> int:
        return -(-len(self.pictures) // IMAGES_PER_SHARD)

    def images(self, shard: int) -> int:
        """How many a shard holds."""
        return min(IMAGES_PER_SHARD, len(self.pictures) - shard * IMAGES_PER_SHARD)

    def records(self, shard: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(pictures, views) of each record of a shard."""
        first = shard * IMAGES_PER_SHARD
        last = first + self.images(shard)
        starts = range(first, last, IMAGES_PER_RECORD)
        parts = [slice(start, min(start + IMAGES_PER_RECORD, last)) for start in starts]
        return [(self.pictures[part], self.views[part]) for part in parts]


@dataclass(frozen=True)
class Plan:
    """What becomes of a source: numbers alone, so that parts and restarts agree on it."""

    config: DataConfig
    splits: dict[str, SplitPlan]
    """By split of the shard set; what comes of streams isn't in it."""
    pieces: dict[str, int]
    """By split of the source that is a stream: its pieces."""

    @property
    def units(self) -> dict[str, int]:
        """How many units each split has; `all_units` lists them."""
        shards = {split: plan.shards for split, plan in self.splits.items()}
        return {split: count for split, count in (shards | self.pieces).items() if count}

    def is_stream(self, unit: Unit) -> bool:
        return unit.split in self.pieces

    @property
    def pictures(self) -> int | None:
        """How many will be met, each counted once of its views; None where streams don't say."""
        return None if self.pieces else sum(int(counts(plan.views).sum()) for plan in self.splits.values())

    @property
    def tars(self) -> int:
        """Those of the streams; 0 without streams."""
        return sum(self.pieces.values()) * self.config.source.tars_per_shard

    def records(self, unit: Unit) -> int:
        """Those of a unit that is no stream."""
        return -(-self.splits[unit.split].images(unit.number) // IMAGES_PER_RECORD)

    def images(self, units: Sequence[Unit]) -> int | None:
        """Those of some units; None where streams don't say."""
        return None if self.pieces else sum(self.splits[unit.split].images(unit.number) for unit in units)


def all_units(counts: Mapping[str, int]) -> list[Unit]:
    """The units of splits with so many each, in the order of the work."""
    return [Unit(split, number) for split, count in counts.items() for number in range(count)]


def counts(views: np.ndarray) -> np.ndarray:
    """Which of some views (n,) stand for their pictures in the counts: of several, the first does. bool (n,)."""
    return (views == EVALUATION) | (views == 0)


def make_plan(source: Source, config: DataConfig) -> Plan:
    """Raises ValueError naming the key that asks for what the source can't give."""
    sizes = {split: len(pictures) for split, pictures in source.splits.items()}
    if config.fold_valid and ("valid" in sizes or "valid" in source.streams):
        raise ValueError(f"fold_valid is true, but {source.name} brings a validation split of its own; leave it out.")
    pieces = {split: len(streams) for split, streams in source.streams.items()}
    return Plan(config, plan_splits(sizes, config), pieces)


def plan_splits(sizes: Mapping[str, int], config: DataConfig) -> dict[str, SplitPlan]:
    """The plan for splits of `sizes` pictures.

    Every split is shuffled once, so that any run of records mixes the classes. Without a validation split
    of the source, the first `valid_fraction` of the shuffled training pictures become `valid`.
    """
    plans = {}
    if "train" in sizes:
        order = _shuffled(sizes["train"], config.seed, "order of train")
        held_out = 0 if "valid" in sizes else round(config.valid_fraction * len(order))
        train = order if config.fold_valid else order[held_out:]
        if not len(train):
            raise ValueError(
                f"valid_fraction is {config.valid_fraction}; it leaves none of {len(order)} training pictures."
            )
        plans["train"] = _training_plan(train, config)
        if held_out:
            plans["valid"] = _evaluation_plan("train", order[:held_out])
    for split in ("valid", "test"):
        if split in sizes:
            plans[split] = _evaluation_plan(split, _shuffled(sizes[split], config.seed, f"order of {split}"))
    return plans


def _shuffled(count: int, seed: int, purpose: str) -> np.ndarray:
    return generator(seed, purpose).permutation(count)


def _evaluation_plan(source_split: str, pictures: np.ndarray) -> SplitPlan:
    return SplitPlan(source_split, pictures, np.full(len(pictures), EVALUATION))


def _training_plan(pictures: np.ndarray, config: DataConfig) -> SplitPlan:
    """All training views of the pictures; with several of each, shuffled again, so that they lie apart."""
    views = config.views.train
    numbers = np.tile(np.arange(views), len(pictures))
    pictures = np.repeat(pictures, views)
    if views > 1:
        order = _shuffled(len(pictures), config.seed, "order of views")
        pictures, numbers = pictures[order], numbers[order]
    return SplitPlan("train", pictures, numbers)
