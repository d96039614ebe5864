"""A piece of a stream, such as one tar, to shards: one worker reads it once, from beginning to end, in flat memory.

Which pictures are held out for validation is drawn for each picture by its place, since the number of pictures is
unknown until the end. The images of each split are shuffled in blocks of BLOCK_IMAGES.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from data_prep.build.encode import Job, Outcome, encoded, samples
from data_prep.build.plan import Unit
from data_prep.build.skips import DAMAGED_TAR, Skip, skip
from data_prep.common.seeding import generator
from data_prep.config import DataConfig
from data_prep.images.crops import EVALUATION, cutter
from data_prep.images.decode import BadImage
from data_prep.shards.format import IMAGES_PER_RECORD
from data_prep.sources.base import Source

BLOCK_IMAGES = 8 * IMAGES_PER_RECORD
"""Training mixes many more, so a block needs only be large enough to part neighbours, and is held in memory."""

View = tuple[str, np.ndarray, int]
"""The split of the shard set, the view uint8 (R, R, 3), its label."""


def stream_views(source: Source, config: DataConfig, unit: Unit) -> Iterator[list[View] | BadImage]:
    """The views of each picture of a piece, or why there are none."""
    views = cutter(source, config, unit.split)
    pictures = enumerate(source.streams[unit.split][unit.number])
    for (place, item), wanted in zip(pictures, _drawn_views(source, config, unit), strict=False):
        if isinstance(item, BadImage):
            yield item
            continue
        try:
            picture = views.decoder(*(number for _, number in wanted))(item.content, item.name)
            cut = [(split, views.cut(picture, number, unit.number, place)) for split, number in wanted]
        except BadImage as bad:
            yield bad
            continue
        yield [(split, view, item.label) for split, view in cut]


def _drawn_views(source: Source, config: DataConfig, unit: Unit) -> Iterator[list[tuple[str, int]]]:
    """(split of the shard set, number of the view) of each view of one picture of a piece after the other."""
    brings_valid = "valid" in source.streams or "valid" in source.splits
    fraction = 0.0 if brings_valid or unit.split != "train" else config.valid_fraction
    random = generator(config.seed, "valid", unit.number)
    training = [("train", number) for number in range(config.views.train)]
    kept = training if unit.split == "train" else [(unit.split, EVALUATION)]
    held_out = [("valid", EVALUATION), *(training if config.fold_valid else [])]
    while True:
        yield held_out if random.random() < fraction else kept


def encode_stream(job: Job, unit: Unit) -> Iterator[Outcome]:
    """The records of a piece; those without images tell what was met and skipped on the way to the next."""
    blocks: dict[str, list[Outcome]] = {}  # of each split, what was encoded since the last shuffle
    shuffled: Counter[str] = Counter()
    for outcome in _encoded(job, unit):
        split, block = outcome.split, blocks.setdefault(outcome.split, [])
        block.append(outcome)
        yield replace(outcome, tokens=outcome.tokens[:0], labels=outcome.labels[:0])
        if sum(len(part.labels) for part in block) >= BLOCK_IMAGES:
            yield from _shuffled(job, unit, block, shuffled[split])
            shuffled[split] += 1
            block.clear()
    for split, block in blocks.items():
        if block:
            yield from _shuffled(job, unit, block, shuffled[split])


def _encoded(job: Job, unit: Unit) -> Iterator[Outcome]:
    """Up to a record's views at a time, in the stream's order; a block is whole after some of them."""
    waiting: dict[str, list[View]] = {}
    pictures = 0
    skips: list[Skip] = []
    for found in stream_views(job.source, job.plan.config, unit):
        if isinstance(found, BadImage):
            skips.append(skip(unit.split, found))
            pictures += found.reason != DAMAGED_TAR
            continue
        pictures += 1
        for view in found:
            waiting.setdefault(view[0], []).append(view)
            if len(waiting[view[0]]) == IMAGES_PER_RECORD:
                yield _encoded_views(job, view[0], waiting.pop(view[0]), pictures, skips)
                pictures, skips = 0, []
    for split, views in waiting.items():
        yield _encoded_views(job, split, views, pictures, skips)
        pictures, skips = 0, []
    yield _encoded_views(job, unit.split, [], pictures, skips)


def _encoded_views(job: Job, split: str, views: list[View], pictures: int, skips: list[Skip]) -> Outcome:
    outcome = encoded(job, split, [view for _, view, _ in views], np.array([label for _, _, label in views], np.int32))
    outcome.pictures, outcome.skips = pictures, skips
    outcome.samples = samples([view for _, view, _ in views], outcome)
    return outcome


def _shuffled(job: Job, unit: Unit, block: list[Outcome], number: int) -> Iterator[Outcome]:
    """The images of a split's block of that number, shuffled, as records."""
    split = block[0].split
    tokens = np.concatenate([part.tokens for part in block])
    labels = np.concatenate([part.labels for part in block])
    order = generator(job.plan.config.seed, "order of", split, *unit, number).permutation(len(labels))
    for start in range(0, len(order), IMAGES_PER_RECORD):
        chosen = order[start : start + IMAGES_PER_RECORD]
        yield Outcome(split, tokens[chosen], labels[chosen], 0)
