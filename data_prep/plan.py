"""Which pictures a shard set holds, in which splits and order: a function of the source and the seed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.config import DataConfig
from data_prep.seeding import generator
from data_prep.shards import IMAGES_PER_RECORD, RECORDS_PER_SHARD
from data_prep.sources import open_source
from data_prep.sources.base import Source
from data_prep.views import EVALUATION, Cutter, PictureViews, Views

IMAGES_PER_SHARD = IMAGES_PER_RECORD * RECORDS_PER_SHARD


@dataclass(frozen=True)
class SplitPlan:
    """The images of one split of the shard set, in file order."""

    source_split: str
    """The split of the source they come from: `train` for the validation images that are held out of it."""
    pictures: np.ndarray
    """int64 (N,): the picture's number in the source's split."""
    views: np.ndarray
    """int64 (N,): the number of its view, or EVALUATION."""

    @property
    def shards(self) -> int:
        return -(-len(self.pictures) // IMAGES_PER_SHARD)

    def records(self, shard: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(pictures, views) of each record of a shard."""
        first, last = shard * IMAGES_PER_SHARD, min((shard + 1) * IMAGES_PER_SHARD, len(self.pictures))
        starts = range(first, last, IMAGES_PER_RECORD)
        parts = [slice(start, min(start + IMAGES_PER_RECORD, last)) for start in starts]
        return [(self.pictures[part], self.views[part]) for part in parts]


def plan_splits(sizes: Mapping[str, int], config: DataConfig) -> dict[str, SplitPlan]:
    """The plan for a source with `sizes` pictures a split.

    Every split is shuffled once, so that any run of records mixes the classes. Without a validation split
    of the source, the first `valid_fraction` of the shuffled training pictures become `valid`.
    """
    order = _shuffled(sizes["train"], config.seed, "order of train")
    held_out = 0 if "valid" in sizes else round(config.valid_fraction * len(order))
    valid, train = order[:held_out], order[held_out:]
    if not len(train):
        raise ValueError(
            f"valid_fraction is {config.valid_fraction}; it leaves none of {len(order)} training pictures."
        )
    plans = {"train": _training_plan(train, config)}
    if "valid" in sizes:
        plans["valid"] = _evaluation_plan("valid", _shuffled(sizes["valid"], config.seed, "order of valid"))
    elif held_out:
        plans["valid"] = _evaluation_plan("train", valid)
    if "test" in sizes:
        plans["test"] = _evaluation_plan("test", _shuffled(sizes["test"], config.seed, "order of test"))
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


def cutter(split: str, source: Source, config: DataConfig) -> Cutter:
    """The views' cutter for one of the source's splits."""
    random_crop = config.views.random_crop
    if random_crop == "auto" and source.cropped:
        random_crop = "never"
    return Cutter(split, config.seed, config.resolution, random_crop)


def open_views(source: Source, config: DataConfig, folder: Path, workers: int) -> dict[str, Views]:
    """The views of each of the source's splits; `folder` takes those of streams (data_prep/spool.py)."""
    views: dict[str, Views] = {
        split: PictureViews(pictures, cutter(split, source, config)) for split, pictures in source.splits.items()
    }
    if source.streams:
        from data_prep.spool import spooled

        for split, stream in source.streams.items():
            training_views = config.views.train if split == "train" else 0
            file = folder / f"streamed-{split}.views"
            views[split] = spooled(stream, cutter(split, source, config), training_views, file, workers)
    return views


def open_plan(config: DataConfig, folder: Path, workers: int) -> tuple[Source, dict[str, Views], dict[str, SplitPlan]]:
    """Opens the source and plans the splits."""
    source = open_source(config.source)
    views = open_views(source, config, folder, workers)
    return source, views, plan_splits({split: len(found) for split, found in views.items()}, config)
