"""A piece of a stream, such as one tar, to shards: one worker reads it once, from beginning to end, in flat memory.

Which pictures are held out for validation is drawn for each picture by its place, since the number of pictures is
unknown until the end. The images of each split are shuffled in blocks of BLOCK_IMAGES.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

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
    held_out = _HeldOut(source, config, unit)
    views = cutter(source, config, unit.split)
    for place, item in enumerate(source.streams[unit.split][unit.number]):
        wanted = held_out.draw()
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


class _HeldOut:
    """Draws for one picture after the other which split it goes to, and as which views."""

    def __init__(self, source: Source, config: DataConfig, unit: Unit) -> None:
        brings_valid = "valid" in source.streams or "valid" in source.splits
        self._fraction = 0.0 if brings_valid or unit.split != "train" else config.valid_fraction
        self._random = generator(config.seed, "valid", unit.number)
        evaluation = [(unit.split, EVALUATION)]
        training = [("train", number) for number in range(config.views.train)]
        self._kept = training if unit.split == "train" else evaluation
        self._taken = [("valid", EVALUATION), *(training if config.fold_valid else [])]

    def draw(self) -> list[tuple[str, int]]:
        """(split of the shard set, number of the view) of each view of the next picture."""
        return self._taken if self._random.random() < self._fraction else self._kept


@dataclass
class _Block:
    """The images of one split since the last shuffle."""

    tokens: list[np.ndarray] = field(default_factory=list)
    labels: list[np.ndarray] = field(default_factory=list)
    images: int = 0
    number: int = 0

    def add(self, outcome: Outcome) -> None:
        self.tokens.append(outcome.tokens)
        self.labels.append(outcome.labels)
        self.images += len(outcome.labels)


def encode_stream(job: Job, unit: Unit) -> Iterator[Outcome]:
    """The records of a piece; those without images tell what was met and skipped on the way to the next."""
    blocks: dict[str, _Block] = {}
    for outcome in _encoded(job, unit):
        block = blocks.setdefault(outcome.split, _Block())
        block.add(outcome)
        yield replace(outcome, tokens=outcome.tokens[:0], labels=outcome.labels[:0])
        if block.images >= BLOCK_IMAGES:
            yield from _shuffled(job, unit, outcome.split, block)
    for split, block in blocks.items():
        if block.images:
            yield from _shuffled(job, unit, split, block)


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


def _shuffled(job: Job, unit: Unit, split: str, block: _Block) -> Iterator[Outcome]:
    """Empties a block: its images, shuffled, as records."""
    tokens, labels = np.concatenate(block.tokens), np.concatenate(block.labels)
    order = generator(job.plan.config.seed, "order of", split, *unit, block.number).permutation(len(labels))
    block.tokens, block.labels, block.images, block.number = [], [], 0, block.number + 1
    for start in range(0, len(order), IMAGES_PER_RECORD):
        chosen = order[start : start + IMAGES_PER_RECORD]
        yield Outcome(split, tokens[chosen], labels[chosen], 0)
