"""Counts the colors of a sample of the training images, in chunks, and fits the palette to the total histogram.

Counts are integers, so the sum does not depend on the order, and the palette not on the number of workers or parts.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from typing import NamedTuple

import numpy as np

from data_prep.build.encode_stream import View, stream_views
from data_prep.build.plan import Plan, Unit
from data_prep.build.skips import SkipCount, skip
from data_prep.common.progress import progress
from data_prep.common.seeding import generator
from data_prep.common.workers import in_workers
from data_prep.config import DataConfig
from data_prep.images.crops import views_of
from data_prep.images.decode import BadImage
from data_prep.palette.codec import CODES, color_codes, fit_palette
from data_prep.shards.addresses import hide_secrets
from data_prep.sources.base import Source

logger = logging.getLogger(__name__)

FIT_PIXELS = 1 << 26
"""The palette is fitted to at most this many pixels: 65,536 images at 32x32."""
FIT_CHUNK = 512
"""Images whose colors a worker counts at a time."""
FIT_STREAMS = 256
"""At most this many streams are sampled: opening each of ten thousand remote tars would take longer than the rest."""


class Chunk(NamedTuple):
    """Images that are counted together: images [start, stop) of train, or of one stream of train."""

    start: int
    stop: int
    stream: int | None = None


def fit_chunks(plan: Plan) -> list[Chunk]:
    """The sample: the first FIT_PIXELS of the shuffled training images, or as many from randomly drawn streams."""
    images = max(1, FIT_PIXELS // plan.config.resolution**2)
    if "train" in plan.splits:
        images = min(len(plan.splits["train"].source_indices), images)
        return [Chunk(start, min(start + FIT_CHUNK, images)) for start in range(0, images, FIT_CHUNK)]
    drawn = generator(plan.config.seed, "palette pieces").permutation(plan.streams["train"])[:FIT_STREAMS]
    return [Chunk(0, -(-images // len(drawn)), int(stream)) for stream in drawn]


def count_chunks(source: Source, plan: Plan, chunks: Sequence[Chunk], workers: int) -> tuple[np.ndarray, SkipCount]:
    """The number of pixels of each 24-bit color in these chunks, int64 (2**24,), and the images that can't be used."""
    histogram, skipped = np.zeros(CODES, np.int64), SkipCount()
    counted = in_workers(_count, (source, plan), chunks, workers)
    streamed = any(chunk.stream is not None for chunk in chunks)  # a stream may be shorter than its share
    total = None if streamed else sum(chunk.stop - chunk.start for chunk in chunks)
    with progress("palette", total) as advance, closing(counted):
        for codes, counts, of_chunk in counted:
            histogram[codes] += counts
            skipped.merge(of_chunk)
            advance(int(counts.sum()) // plan.config.resolution**2)
    if skipped.reasons and histogram.any():
        logger.info(f"palette: {skipped.reasons.total():,} images are not used, {skipped}; `shards` reports them")
    return histogram, skipped


def fit_histogram(histogram: np.ndarray, config: DataConfig, skipped: SkipCount | None = None) -> np.ndarray:
    """The palette of a complete histogram: float32 (V, 3). Raises ValueError with what was skipped if it is empty."""
    distinct = int(np.count_nonzero(histogram))
    if not distinct:
        reasons = "the parts logged why" if skipped is None else str(skipped) or "no image was found"
        raise ValueError(
            f"source.path {hide_secrets(str(config.source.path))} has no usable training image; {reasons}."
        )
    if distinct < config.palette.colors:
        unused = config.palette.colors - distinct
        logger.info(f"palette: the images have {distinct} colors; {unused} palette entries are unused")
    return fit_palette(histogram, config.palette.colors, config.seed)


def fit(source: Source, plan: Plan, workers: int) -> np.ndarray:
    """The palette of the sample: float32 (V, 3)."""
    histogram, skipped = count_chunks(source, plan, fit_chunks(plan), workers)
    return fit_histogram(histogram, plan.config, skipped)


def _count(state: tuple[Source, Plan], chunk: Chunk) -> tuple[np.ndarray, np.ndarray, SkipCount]:
    """The color codes in a chunk, their counts, and what can't be used. At most FIT_CHUNK views are in memory."""
    skipped = SkipCount()
    views = (_split_views if chunk.stream is None else _stream_views)(*state, chunk, skipped)
    codes, counts = np.empty(0, np.uint32), np.empty(0, np.int64)
    while pixels := list(islice(views, FIT_CHUNK)):
        new_codes, new_counts = np.unique(color_codes(np.stack(pixels)), return_counts=True)
        codes, positions = np.unique(np.concatenate([codes, new_codes]), return_inverse=True)
        counts = np.bincount(positions, np.concatenate([counts, new_counts]), len(codes)).astype(np.int64)
    return codes, counts, skipped


def _split_views(source: Source, plan: Plan, chunk: Chunk, skipped: SkipCount) -> Iterator[np.ndarray]:
    """The usable views of a chunk; the others are counted in `skipped`."""
    split = plan.splits["train"]
    views = views_of(source, plan.config, split.source_split)
    part = slice(chunk.start, chunk.stop)
    for index, number in zip(split.source_indices[part], split.views[part], strict=True):
        try:
            yield views.view(int(index), int(number))
        except BadImage as bad:
            skipped.add(skip(split.source_split, bad))


def _stream_views(source: Source, plan: Plan, chunk: Chunk, skipped: SkipCount) -> Iterator[np.ndarray]:
    """The first training view of each of the first usable images of a stream."""
    assert chunk.stream is not None
    found = stream_views(source, plan.config, Unit("train", chunk.stream))
    return islice(_first_views(found, skipped), chunk.stop)


def _first_views(found: Iterator[list[View] | BadImage], skipped: SkipCount) -> Iterator[np.ndarray]:
    """The first training view of each usable image; the others are counted in `skipped`."""
    for views in found:
        if isinstance(views, BadImage):
            skipped.add(skip("train", views))
        else:
            yield from [view for split, view, _ in views if split == "train"][:1]
