"""A streamed split, read once: its views are kept on disk, where they can be read in any order.

A stream's length is unknown until its end, and with it which pictures the validation split takes. So the
evaluation view of each picture is kept beside its training views; at 32x32 a view has 3 kB.
"""

from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np

from data_prep.files import read_json, write_json, written_aside
from data_prep.parallel import in_workers
from data_prep.progress import progress
from data_prep.sources.base import Encoded, PictureStream, decode_picture
from data_prep.views import EVALUATION, Cutter

CHUNK = 64
"""Pictures handed to a worker at a time."""


class SpooledViews:
    """The kept views of a stream."""

    def __init__(self, views: np.ndarray, labels: np.ndarray) -> None:
        """views: uint8 (N, 1 + training views, R, R, 3), the evaluation view first; labels int32 (N,)."""
        self.views, self.labels = views, labels

    def __len__(self) -> int:
        return len(self.views)

    def view(self, index: int, number: int) -> np.ndarray:
        return self.views[index, number - EVALUATION]


def spooled(stream: PictureStream, cutter: Cutter, training_views: int, file: Path, workers: int) -> SpooledViews:
    """Reads a stream to its end, or takes what an earlier call has kept in `file`, if that is whole."""
    labels_file = file.with_suffix(".labels.json")
    shape = (1 + training_views, cutter.resolution, cutter.resolution, 3)
    if not labels_file.is_file():
        labels = _read(stream, cutter, training_views, file, workers)
        if not labels:
            raise ValueError(f"split {cutter.split} of the stream has no pictures.")
        write_json(labels_file, labels)
    labels_array = np.array(read_json(labels_file), np.int32)
    return SpooledViews(np.memmap(file, np.uint8, "r", shape=(len(labels_array), *shape)), labels_array)


def _read(stream: PictureStream, cutter: Cutter, training_views: int, file: Path, workers: int) -> list[int]:
    numbers = [EVALUATION, *range(training_views)]
    labels: list[int] = []
    cut = in_workers(_cut, (cutter, numbers), _chunks(stream), workers)
    with (
        progress(f"reading {cutter.split}") as advance,
        closing(cut),
        written_aside(file) as aside,
        aside.open("wb") as out,
    ):
        for views, chunk_labels in cut:
            out.write(views.tobytes())
            labels += chunk_labels
            advance(len(chunk_labels))
    return labels


def _chunks(stream: Iterable[Encoded]) -> Iterator[tuple[int, list[Encoded]]]:
    """The number of its first picture, with each chunk of the stream."""
    pictures = iter(stream)
    start = 0
    while chunk := list(islice(pictures, CHUNK)):
        yield start, chunk
        start += len(chunk)


def _cut(state: tuple[Cutter, list[int]], task: tuple[int, list[Encoded]]) -> tuple[np.ndarray, list[int]]:
    cutter, numbers = state
    start, chunk = task
    views = []
    for index, item in enumerate(chunk, start):
        picture = decode_picture(item.content, item.name)
        views.append([cutter.cut(picture, index, number) for number in numbers])
    return np.array(views, np.uint8), [item.label for item in chunk]
