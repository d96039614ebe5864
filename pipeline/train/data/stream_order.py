"""The order of images that are streamed: a pure function of (seed, position, data-parallel ranks).

An epoch permutes the shards and reads them one after the other, records as they lie in the file. Rank r of D has the
images from r * N // D to (r + 1) * N // D of that sequence of N; the cuts fall between images, so each is read by
one rank, whatever the numbers of shards and ranks. A rank reads its part in windows of records and shuffles the
images of a window; at the end of its part it continues with its part of the next epoch, so it always has a next batch.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data_prep.common.seeding import generator
from pipeline.model.augmentation import Augmentation, Changes
from pipeline.train.data.batches import FINGERPRINT_IMAGES, STREAMED, WINDOW_RECORDS, window_starts


@dataclass(frozen=True)
class Part:
    """What a rank reads in one epoch, record by record: int64 (R,) each."""

    records: np.ndarray
    """Numbers in file order."""
    first_rows: np.ndarray
    """The first image that is this rank's; not 0 only where the part begins inside a record."""
    stop_rows: np.ndarray
    """One past the last."""

    def window(self, number: int) -> "Part":
        """The records of one window."""
        window = slice(number * WINDOW_RECORDS, (number + 1) * WINDOW_RECORDS)
        return Part(self.records[window], self.first_rows[window], self.stop_rows[window])

    @property
    def images(self) -> int:
        """Images of all its records together."""
        return int((self.stop_rows - self.first_rows).sum())


@dataclass(frozen=True)
class Window:
    """A rank's records that are shuffled with each other."""

    part: Part
    shuffled: np.ndarray
    """int64 (n,): the images in the order they are trained on, by their place in the order they are read."""
    changes: Changes
    """What is done to the images, in the order they are trained on."""


class StreamOrder:
    """Which images each rank of a streamed run reads when."""

    def __init__(
        self,
        shards: Sequence[Sequence[int] | np.ndarray],
        seed: int,
        ranks: int,
        augmentation: Augmentation | None = None,
    ) -> None:
        """shards: images of each record, for each shard. ranks: D, at most as many as there are images."""
        self._shards = [np.asarray(records, np.int64) for records in shards]
        self._record_images = np.concatenate(self._shards)
        self._first_image = np.concatenate([[0], np.cumsum(self._record_images)])
        self._first_record = np.concatenate([[0], np.cumsum([len(records) for records in self._shards])])
        self._seed = seed
        self.augmentation = augmentation or Augmentation()
        self.ranks = ranks
        self.images = int(self._first_image[-1])
        assert self.images >= ranks
        self.part = lru_cache(maxsize=3)(self._new_part)
        self.window = lru_cache(maxsize=3)(self._new_window)

    def slices(self, rank: int, position: int, count: int) -> Iterator[tuple[tuple[int, int], slice]]:
        """Of the `count` images that a rank reads after `position` others: each (epoch, window), and which of it."""
        while count:
            epoch, place = divmod(position, self._stop(rank) - self._stop(rank - 1))
            part = self.part(rank, epoch)
            starts = window_starts(part.stop_rows - part.first_rows)
            window = int(np.searchsorted(starts, place, side="right")) - 1
            first = place - int(starts[window])
            taken = min(count, len(self.window(rank, epoch, window).shuffled) - first)
            yield (epoch, window), slice(first, first + taken)
            position, count = position + taken, count - taken

    def following(self, rank: int, epoch: int, window: int) -> tuple[int, int]:
        """The epoch and number of the window after this one."""
        more = (window + 1) * WINDOW_RECORDS < len(self.part(rank, epoch).records)
        return (epoch, window + 1) if more else (epoch + 1, 0)

    def at(self, rank: int, position: int, count: int) -> tuple[np.ndarray, Changes]:
        """The `count` images that a rank reads after `position` others: indices in file order int64, and changes."""
        indices, changes = [], []
        for key, chosen in self.slices(rank, position, count):
            window = self.window(rank, *key)
            indices.append(self._indices(window.part)[window.shuffled[chosen]])
            changes.append(window.changes[chosen])
        return np.concatenate(indices), Changes.join(changes)

    def image_numbers(self, position: int, count: int) -> list[int]:
        """Those that all ranks read, one rank's after the other's; position and count: images of all ranks."""
        share = count // self.ranks
        read = [self.at(rank, position // self.ranks, share)[0] for rank in range(self.ranks)]
        return [int(number) for number in np.concatenate(read)]

    def fingerprint(self, position: int) -> str:
        """The ranks, and a digest of what the first and the last of them read next; position: images of all ranks."""
        digest = hashlib.sha256()
        for rank in (0, self.ranks - 1):
            indices, changes = self.at(rank, position // self.ranks, FINGERPRINT_IMAGES)
            digest.update(indices.tobytes() + self.augmentation.bytes_of(changes))
        return f"{STREAMED}{self.ranks}/{digest.hexdigest()[:16]}"

    def moved_from(self, recorded: str, position: int) -> str | None:
        """The message for a run with another fingerprint that can resume; None if it can't."""
        what = "from here to the end of the epoch some images are read again and others left out"
        if not recorded.startswith(STREAMED):
            return f"the run was read by index so far and is streamed now; {what}"
        ranks = int(recorded.removeprefix(STREAMED).partition("/")[0])
        before = StreamOrder(self._shards, self._seed, ranks, self.augmentation)
        if ranks == self.ranks or before.fingerprint(position) != recorded:
            return None
        return f"the run was streamed to {ranks} data-parallel ranks so far and is to {self.ranks} now; {what}"

    def _stop(self, rank: int) -> int:
        """One past the rank's last image in the sequence of an epoch."""
        return (rank + 1) * self.images // self.ranks

    def _new_part(self, rank: int, epoch: int) -> Part:
        shards = generator(self._seed, "shards", epoch).permutation(len(self._shards))
        records = np.concatenate([np.arange(self._first_record[s], self._first_record[s + 1]) for s in shards])
        images = self._record_images[records]
        ends = np.cumsum(images)
        first_image, stop_image = self._stop(rank - 1), self._stop(rank)
        first = int(np.searchsorted(ends, first_image, side="right"))
        own = slice(first, int(np.searchsorted(ends, stop_image, side="left")) + 1)
        before = (ends - images)[own]
        first_rows = np.maximum(first_image - before, 0)
        return Part(records[own], first_rows, np.minimum(stop_image - before, images[own]))

    def _new_window(self, rank: int, epoch: int, number: int) -> Window:
        part = self.part(rank, epoch).window(number)
        draw = generator(self._seed, "stream", epoch, rank, self.ranks, number)
        shuffled = draw.permutation(part.images)
        return Window(part, shuffled, self.augmentation.draw(draw, part.images))

    def _indices(self, part: Part) -> np.ndarray:
        """The images of some records by their number in file order, in the order they are read."""
        starts = self._first_image[part.records]
        ranges = zip(starts + part.first_rows, starts + part.stop_rows, strict=True)
        return np.concatenate([np.arange(first, stop) for first, stop in ranges])
