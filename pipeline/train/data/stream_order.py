"""The data order of a streamed shard set: a pure function of (seed, position, data-parallel ranks).

An epoch permutes the shards and reads them one after the other, records in file order. Rank r of D reads images
r * N // D to (r + 1) * N // D of that sequence of N. The split falls between images, so each image is read by exactly
one rank, for any number of shards and ranks. A rank reads its part in windows of records and shuffles the images of a
window. At the end of its part it continues with its part of the next epoch, so it always has a next batch.
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
    """The records that a rank reads in one epoch: int64 (R,) each."""

    records: np.ndarray
    """Indices in file order."""
    first_rows: np.ndarray
    """First image of each record that is this rank's; 0, except where the part starts inside a record."""
    stop_rows: np.ndarray
    """One past this rank's last image of each record."""

    def window(self, number: int) -> "Part":
        """The records of one window."""
        window = slice(number * WINDOW_RECORDS, (number + 1) * WINDOW_RECORDS)
        return Part(self.records[window], self.first_rows[window], self.stop_rows[window])

    @property
    def images(self) -> int:
        """Number of images."""
        return int((self.stop_rows - self.first_rows).sum())


@dataclass(frozen=True)
class Window:
    """A shuffle window of a rank."""

    part: Part
    shuffled: np.ndarray
    """int64 (n,): for each image in training order, its index in read order."""
    changes: Changes
    """Augmentations of the images, in training order."""


class StreamOrder:
    """Maps the positions of each rank of a streamed run to images."""

    def __init__(
        self,
        shards: Sequence[Sequence[int] | np.ndarray],
        seed: int,
        ranks: int,
        augmentation: Augmentation | None = None,
    ) -> None:
        """shards: for each shard, the number of images in each record. ranks: D, at most the number of images."""
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
        """The windows (epoch, number) of a rank's images [position, position + count), with a slice of each."""
        while count:
            epoch, in_epoch = divmod(position, self._stop(rank) - self._stop(rank - 1))
            part = self.part(rank, epoch)
            starts = window_starts(part.stop_rows - part.first_rows)
            window = int(np.searchsorted(starts, in_epoch, side="right")) - 1
            first = in_epoch - int(starts[window])
            taken = min(count, len(self.window(rank, epoch, window).shuffled) - first)
            yield (epoch, window), slice(first, first + taken)
            position, count = position + taken, count - taken

    def following(self, rank: int, epoch: int, window: int) -> tuple[int, int]:
        """The epoch and number of the window after this one."""
        more = (window + 1) * WINDOW_RECORDS < len(self.part(rank, epoch).records)
        return (epoch, window + 1) if more else (epoch + 1, 0)

    def at(self, rank: int, position: int, count: int) -> tuple[np.ndarray, Changes]:
        """A rank's images [position, position + count): int64 indices in file order, and augmentations."""
        indices, changes = [], []
        for key, chosen in self.slices(rank, position, count):
            window = self.window(rank, *key)
            indices.append(self._indices(window.part)[window.shuffled[chosen]])
            changes.append(window.changes[chosen])
        return np.concatenate(indices), Changes.join(changes)

    def image_numbers(self, position: int, count: int) -> list[int]:
        """Indices in file order of the images of all ranks, concatenated; position and count: images of all ranks."""
        share = count // self.ranks
        read = [self.at(rank, position // self.ranks, share)[0] for rank in range(self.ranks)]
        return [int(number) for number in np.concatenate(read)]

    def epochs(self, position: int) -> dict[str, float]:
        """Empty: a single set."""
        return {}

    def fingerprint(self, position: int) -> str:
        """Number of ranks, and a digest of the next images of the first and last rank; position: of all ranks."""
        digest = hashlib.sha256()
        for rank in (0, self.ranks - 1):
            indices, changes = self.at(rank, position // self.ranks, FINGERPRINT_IMAGES)
            digest.update(indices.tobytes() + self.augmentation.bytes_of(changes))
        return f"{STREAMED}{self.ranks}/{digest.hexdigest()[:16]}"

    def resume_warning(self, recorded: str, position: int) -> str | None:
        """The warning for a run that read by index, or was streamed to other ranks; None if it can't resume."""
        what = "until the end of the epoch some images are read twice and others are skipped"
        if not recorded.startswith(STREAMED):
            return f"the run was read by index before and is streamed now; {what}"
        ranks = int(recorded.removeprefix(STREAMED).partition("/")[0])
        before = StreamOrder(self._shards, self._seed, ranks, self.augmentation)
        if ranks == self.ranks or before.fingerprint(position) != recorded:
            return None
        return f"the run was streamed to {ranks} data-parallel ranks before and to {self.ranks} now; {what}"

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
        """Indices in file order of the images of a part, in read order."""
        starts = self._first_image[part.records]
        ranges = zip(starts + part.first_rows, starts + part.stop_rows, strict=True)
        return np.concatenate([np.arange(first, stop) for first, stop in ranges])
