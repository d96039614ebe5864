"""Source images to a packed record: the task of a worker process for splits with random access."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from data_prep.build.plan import Plan, Unit, is_first_view
from data_prep.build.skips import Skip, skip
from data_prep.images.crops import views_of
from data_prep.images.decode import BadImage
from data_prep.palette.codec import decode, encode
from data_prep.sources.base import Source

SAMPLES = 24
"""Views that are saved for the preview of the result."""


@dataclass(frozen=True)
class Job:
    """The inputs of a worker, inherited by fork."""

    source: Source
    plan: Plan
    palette: np.ndarray
    """float32 (V, 3)."""
    table: np.ndarray
    """uint16 (2**24,): the palette's lookup table."""


Samples = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Views uint8 (n, R, R, 3), their tokens uint16 (n, T), and labels int32 (n,)."""


@dataclass
class Outcome:
    """The images of one record, possibly none, with the number of source images processed and skipped."""

    split: str
    """Of the shard set."""
    tokens: np.ndarray
    """uint16 (n, T)."""
    labels: np.ndarray
    """int32 (n,)."""
    source_images: int
    """Number of source images processed, including skipped ones, without those that source.where excludes."""
    skips: list[Skip] = field(default_factory=list)
    filtered: dict[str, dict[str, int]] = field(default_factory=dict)
    """By split of the source and reason: the number of images that source.where excludes."""
    squared_error: int = 0
    """Of the palette colors against the original pixels, summed over all channels of all pixels."""
    samples: Samples | None = None
    """The first few images, if the preview of the result shows them."""


def encode_record(job: Job, task: tuple[Unit, int]) -> Outcome:
    """One record of a unit."""
    unit, record = task
    plan = job.plan.splits[unit.split]
    indices, numbers = plan.records(unit.number)[record]
    views = views_of(job.source, job.plan.config, plan.source_split)
    counted = is_first_view(numbers)
    cropped, usable, skips = [], [], []
    for position, (index, number) in enumerate(zip(indices, numbers, strict=True)):
        try:
            cropped.append(views.view(int(index), int(number)))
            usable.append(position)
        except BadImage as bad:
            if counted[position]:
                skips.append(skip(unit.split, bad))
    outcome = encoded(job, unit.split, cropped, views.labels[indices[usable]])
    outcome.source_images, outcome.skips = int(counted.sum()), skips
    if (unit.number, record) == (0, 0) and unit.split == "train":
        outcome.samples = samples(cropped, outcome)
    return outcome


def samples(views: Sequence[np.ndarray], outcome: Outcome) -> Samples | None:
    """The first of the views that `outcome` was made of; None if there are none."""
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
    """Summed over all channels of images uint8 (n, R, R, 3). Exact: OpenCV adds integers."""
    import cv2

    return int(cv2.norm(pixels.reshape(len(pixels), -1), stored.reshape(len(stored), -1), cv2.NORM_L2SQR))
