"""One stream, such as a tar, to shards: a worker reads it once, from start to end, in constant memory.

The number of images is unknown until the end, so the held-out validation images are drawn one by one, each by its
position in the stream. The images of each split are shuffled in blocks of BLOCK_IMAGES.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from data_prep.build.encode import Job, Outcome, encoded, samples
from data_prep.build.plan import Unit
from data_prep.build.skips import Processed
from data_prep.common.seeding import generator
from data_prep.config import DataConfig
from data_prep.images.crops import EVALUATION, make_cropper
from data_prep.images.decode import BadImage
from data_prep.shards.format import IMAGES_PER_RECORD
from data_prep.sources.base import Source

BLOCK_IMAGES = 8 * IMAGES_PER_RECORD
"""A block is held in memory. It only has to separate neighbors: the training order mixes many more images."""

View = tuple[str, np.ndarray, int]
"""The split of the shard set, the view uint8 (R, R, 3), its label."""


def stream_views(source: Source, config: DataConfig, unit: Unit) -> Iterator[list[View] | BadImage]:
    """The views of each image of a stream, or the reason why the image can't be used."""
    cropper = make_cropper(source, config, unit.split)
    items = enumerate(source.streams[unit.split][unit.number])
    for (position, item), wanted in zip(items, _drawn_views(source, config, unit), strict=False):
        if isinstance(item, BadImage):
            yield item
            continue
        try:
            image = cropper.decoder(*(number for _, number in wanted))(item.content, item.name)
            views = [(split, cropper.crop(image, number, unit.number, position)) for split, number in wanted]
            if original := source.original_of(image, unit.split):
                raise BadImage(item.name, "near-duplicate", original)
        except BadImage as bad:
            yield bad
            continue
        yield [(split, view, item.label) for split, view in views]


def _drawn_views(source: Source, config: DataConfig, unit: Unit) -> Iterator[list[tuple[str, int]]]:
    """For one image of a stream after the other: (split of the shard set, number of the view) of each view."""
    has_valid = "valid" in source.streams or "valid" in source.splits
    fraction = 0.0 if has_valid or unit.split != "train" else config.valid_fraction
    random = generator(config.seed, "valid", unit.number)
    training = [("train", number) for number in range(config.views.train)]
    usual = training if unit.split == "train" else [(unit.split, EVALUATION)]
    held_out = [("valid", EVALUATION), *(training if config.fold_valid else [])]
    while True:
        yield held_out if random.random() < fraction else usual


def encode_stream(job: Job, unit: Unit) -> Iterator[Outcome]:
    """The records of a stream. Outcomes without images between them report the source images processed since."""
    blocks: dict[str, list[Outcome]] = {}  # by split: what was encoded since the last shuffle
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
    """Up to IMAGES_PER_RECORD views at a time, in the order of the stream."""
    waiting: dict[str, list[View]] = {}
    processed = Processed(unit.split)
    for found in stream_views(job.source, job.plan.config, unit):
        if isinstance(found, BadImage):
            processed.skip(found)
            continue
        processed.images += 1
        for view in found:
            waiting.setdefault(view[0], []).append(view)
            if len(waiting[view[0]]) == IMAGES_PER_RECORD:
                yield _encoded_views(job, view[0], waiting.pop(view[0]), processed)
                processed = Processed(unit.split)
    for split, views in waiting.items():
        yield _encoded_views(job, split, views, processed)
        processed = Processed(unit.split)
    yield _encoded_views(job, unit.split, [], processed)


def _encoded_views(job: Job, split: str, views: list[View], processed: Processed) -> Outcome:
    outcome = encoded(job, split, [view for _, view, _ in views], np.array([label for _, _, label in views], np.int32))
    outcome.source_images, outcome.skips = processed.images, processed.skips
    outcome.filtered = {processed.split: processed.filtered}
    outcome.samples = samples([view for _, view, _ in views], outcome)
    return outcome


def _shuffled(job: Job, unit: Unit, block: list[Outcome], number: int) -> Iterator[Outcome]:
    """The images of a block, shuffled, as records; `number` counts the blocks of a split."""
    split = block[0].split
    tokens = np.concatenate([part.tokens for part in block])
    labels = np.concatenate([part.labels for part in block])
    order = generator(job.plan.config.seed, "order of", split, *unit, number).permutation(len(labels))
    for start in range(0, len(order), IMAGES_PER_RECORD):
        chosen = order[start : start + IMAGES_PER_RECORD]
        yield Outcome(split, tokens[chosen], labels[chosen], 0)
