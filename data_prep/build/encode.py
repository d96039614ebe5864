"""Source images to the images of a record: what worker processes do where a split can be read in any order."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from data_prep.build.plan import Plan, Unit, counts
from data_prep.build.skips import Skip, skip
from data_prep.images.crops import views_of
from data_prep.images.decode import BadImage
from data_prep.palette.codec import decode, encode
from data_prep.sources.base import Source

SAMPLES = 24
"""Images whose views are kept for the picture of the result."""


@dataclass(frozen=True)
class Job:
    """What a worker needs, handed on by fork."""

    source: Source
    plan: Plan
    palette: np.ndarray
    """float32 (V, 3)."""
    table: np.ndarray
    """uint16 (2**24,): the palette's lookup table."""


Samples = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Views as cut uint8 (n, R, R, 3), what was stored of them, tokens uint16 (n, T), and labels int32 (n,)."""


@dataclass
class Outcome:
    """The images of one record, maybe none, and what to say of the pictures that they were made from."""

    split: str
    """Of the shard set."""
    tokens: np.ndarray
    """uint16 (n, T)."""
    labels: np.ndarray
    """int32 (n,)."""
    pictures: int
    """Met, those that were skipped among them."""
    skips: list[Skip] = field(default_factory=list)
    squared_error: int = 0
    """Of the stored colours, summed over all channels of all pixels."""
    samples: Samples | None = None
    """The first few images, where the picture of the result shows them."""


def encode_record(job: Job, task: tuple[Unit, int]) -> Outcome:
    """One record of a unit."""
    unit, record = task
    plan = job.plan.splits[unit.split]
    pictures, numbers = plan.records(unit.number)[record]
    views = views_of(job.source, job.plan.config, plan.source_split)
    counted = counts(numbers)
    cut, kept, skips = [], [], []
    for place, (picture, number) in enumerate(zip(pictures, numbers, strict=True)):
        try:
            cut.append(views.view(int(picture), int(number)))
            kept.append(place)
        except BadImage as bad:
            if counted[place]:
                skips.append(skip(unit.split, bad))
    outcome = encoded(job, unit.split, cut, views.labels[pictures[kept]])
    outcome.pictures, outcome.skips = int(counted.sum()), skips
    if (unit.number, record) == (0, 0) and unit.split == "train":
        outcome.samples = samples(cut, outcome)
    return outcome


def samples(views: Sequence[np.ndarray], outcome: Outcome) -> Samples | None:
    """The first of the views that `outcome` was made of; None where there are none."""
    return (np.stack(views[:SAMPLES]), outcome.tokens[:SAMPLES], outcome.labels[:SAMPLES]) if views else None


def encoded(job: Job, split: str, views: Sequence[np.ndarray], labels: np.ndarray) -> Outcome:
    """The outcome of views uint8 (R, R, 3) and their labels (n,)."""
    resolution = job.plan.config.resolution
    if not views:
        return Outcome(split, np.empty((0, resolution**2), np.uint16), np.empty(0, np.int32), 0)
    pixels = np.stack(views)  # (n, R, R, 3)
    tokens = encode(pixels, job.table)  # (n, T)
    stored = decode(tokens, job.palette, resolution)
    return Outcome(split, tokens, labels.astype(np.int32), 0, squared_error=squared_error(pixels, stored))


def squared_error(pixels: np.ndarray, stored: np.ndarray) -> int:
    """Summed over all channels of pictures uint8 (n, R, R, 3); exact: OpenCV adds whole numbers."""
    import cv2

    return int(cv2.norm(pixels.reshape(len(pixels), -1), stored.reshape(len(stored), -1), cv2.NORM_L2SQR))
