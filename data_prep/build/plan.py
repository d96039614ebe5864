"""Which images go into which splits and shards of a shard set, and in which order: a function of source and seed.

Units are independent work items, prepared in any order. A split with random access is shuffled entirely, and a unit
is one shard of it. A split that is read as streams has one unit for each stream, such as a tar. The number of images
in a stream is unknown; they are shuffled in blocks, and the unit writes up to one shard of train and one of valid.
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
    """One work item."""

    split: str
    """A split of the shard set; for a stream, a split of the source."""
    number: int

    @property
    def name(self) -> str:
        return shard_name(*self).removesuffix(".tar")


@dataclass(frozen=True)
class SplitPlan:
    """The images of one split of the shard set, in file order, for sources with random access."""

    source_split: str
    """The split of the source: `train` for validation images that are held out of it."""
    source_indices: np.ndarray
    """int64 (N,): the index of each image in the source's split."""
    views: np.ndarray
    """int64 (N,): the number of the view, or EVALUATION."""

    @property
    def shards(self) -> int:
        return -(-len(self.source_indices) // IMAGES_PER_SHARD)

    def images(self, shard: int) -> int:
        """The number of images in a shard."""
        return min(IMAGES_PER_SHARD, len(self.source_indices) - shard * IMAGES_PER_SHARD)

    def records(self, shard: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(source_indices, views) of each record of a shard."""
        first = shard * IMAGES_PER_SHARD
        last = first + self.images(shard)
        starts = range(first, last, IMAGES_PER_RECORD)
        parts = [slice(start, min(start + IMAGES_PER_RECORD, last)) for start in starts]
        return [(self.source_indices[part], self.views[part]) for part in parts]


@dataclass(frozen=True)
class Plan:
    """The assignment of source images to units. It is deterministic, so parts and restarts agree on it."""

    config: DataConfig
    splits: dict[str, SplitPlan]
    """By split of the shard set; empty for streams."""
    streams: dict[str, int]
    """By split of the source that is read as streams: the number of streams."""

    @property
    def units(self) -> dict[str, int]:
        """The number of units of each split; `all_units` lists them."""
        shards = {split: plan.shards for split, plan in self.splits.items()}
        return {split: count for split, count in (shards | self.streams).items() if count}

    def is_stream(self, unit: Unit) -> bool:
        return unit.split in self.streams

    @property
    def source_images(self) -> int | None:
        """The number of source images, each counted once whatever its views; None for streams, as it is unknown."""
        return None if self.streams else sum(int(is_first_view(plan.views).sum()) for plan in self.splits.values())

    @property
    def tars(self) -> int:
        """The number of tars in the streams; 0 without streams."""
        return sum(self.streams.values()) * self.config.source.tars_per_shard

    def records(self, unit: Unit) -> int:
        """The number of records in a unit that is not a stream."""
        return -(-self.splits[unit.split].images(unit.number) // IMAGES_PER_RECORD)

    def images(self, units: Sequence[Unit]) -> int | None:
        """The number of stored images in some units; None for streams, as it is unknown."""
        return None if self.streams else sum(self.splits[unit.split].images(unit.number) for unit in units)


def all_units(counts: Mapping[str, int]) -> list[Unit]:
    """All units, given their number in each split, in the order in which they are prepared."""
    return [Unit(split, number) for split, count in counts.items() for number in range(count)]


def is_first_view(views: np.ndarray) -> np.ndarray:
    """bool (n,): true for one view of each source image, so that images can be counted by their views (n,)."""
    return (views == EVALUATION) | (views == 0)


def make_plan(source: Source, config: DataConfig) -> Plan:
    """Raises ValueError naming the key that does not fit the source."""
    sizes = {split: len(images) for split, images in source.splits.items()}
    if config.fold_valid and ("valid" in sizes or "valid" in source.streams):
        raise ValueError(f"fold_valid is true, but {source.name} has a validation split of its own; remove fold_valid.")
    streams = {split: len(found) for split, found in source.streams.items()}
    return Plan(config, plan_splits(sizes, config), streams)


def plan_splits(sizes: Mapping[str, int], config: DataConfig) -> dict[str, SplitPlan]:
    """The plan for splits of `sizes` images.

    Every split is shuffled once, so that consecutive records mix the classes. If the source has no validation split,
    the first `valid_fraction` of the shuffled training images become `valid`.
    """
    plans = {}
    if "train" in sizes:
        order = _shuffled(sizes["train"], config.seed, "order of train")
        held_out = 0 if "valid" in sizes else round(config.valid_fraction * len(order))
        train = order if config.fold_valid else order[held_out:]
        if not len(train):
            raise ValueError(
                f"valid_fraction is {config.valid_fraction}, which leaves no training image of {len(order)}; lower it."
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


def _evaluation_plan(source_split: str, indices: np.ndarray) -> SplitPlan:
    return SplitPlan(source_split, indices, np.full(len(indices), EVALUATION))


def _training_plan(indices: np.ndarray, config: DataConfig) -> SplitPlan:
    """All training views of the images. Several views of an image are shuffled again, so that they are not adjacent."""
    views = config.views.train
    numbers = np.tile(np.arange(views), len(indices))
    indices = np.repeat(indices, views)
    if views > 1:
        order = _shuffled(len(indices), config.seed, "order of views")
        indices, numbers = indices[order], numbers[order]
    return SplitPlan("train", indices, numbers)
