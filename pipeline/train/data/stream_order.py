"""The data order of a streamed shard set: a pure function of (seed, position, data-parallel ranks).

An epoch permutes the shards and reads them one after the other, records in file order. Rank r of D reads images
r * N // D to (r + 1) * N // D of that sequence of N. The split falls between images, so each image is read by exactly
one rank, for any number of shards and ranks. A rank reads its part in windows of records and shuffles the images of a
window. At the end of its part it continues with its part of the next epoch, so it always has a next batch.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

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
    chosen: dict[int, np.ndarray] = field(default_factory=dict)
    """By index in `records`, ascending: the images of a record of which some are read already; rows are then those of
    the rest."""

    def window(self, number: int) -> "Part":
        """The records of one window."""
        return self._slice(number * WINDOW_RECORDS, (number + 1) * WINDOW_RECORDS)

    def after(self, number: int) -> "Part":
        """The records of all windows after this one."""
        return self._slice((number + 1) * WINDOW_RECORDS, len(self.records))

    @property
    def sizes(self) -> np.ndarray:
        """Number of images of each record."""
        return self.stop_rows - self.first_rows

    @cached_property
    def _ends(self) -> np.ndarray:
        """One past the last image of each record, in read order."""
        return np.cumsum(self.sizes)

    @cached_property
    def _chosen_indices(self) -> list[int]:
        return list(self.chosen)

    @property
    def images(self) -> int:
        """Number of images."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def rows(self, index: int) -> np.ndarray | slice:
        """The images of a record that are read."""
        rows = slice(int(self.first_rows[index]), int(self.stop_rows[index]))
        return self.chosen[index][rows] if index in self.chosen else rows

    def between(self, first: int, stop: int) -> "Part":
        """The images [first, stop), in read order."""
        ends = self._ends
        begin = int(np.searchsorted(ends, first, side="right"))
        end = int(np.searchsorted(ends, stop, side="left")) + 1 if stop > first else begin
        part = self._slice(begin, end)
        before = ends[begin:end] - part.sizes
        first_rows = part.first_rows + np.maximum(first - before, 0)
        return Part(part.records, first_rows, np.minimum(part.first_rows + stop - before, part.stop_rows), part.chosen)

    def choose(self, images: np.ndarray) -> "Part":
        """Some of the images, by their sorted indices in read order."""
        of_record = np.searchsorted(self._ends, images, side="right")
        kept, counts = np.unique(of_record, return_counts=True)
        rows = images - (self._ends - self.stop_rows)[of_record]
        chosen = {}
        for index, (record, within) in enumerate(zip(kept, np.split(rows, np.cumsum(counts)[:-1]), strict=True)):
            chosen[index] = self.chosen[record][within] if record in self.chosen else within
        return Part(self.records[kept], np.zeros_like(counts), counts, chosen)

    @classmethod
    def join(cls, parts: Sequence["Part"]) -> "Part":
        """Concatenates them."""
        starts = np.cumsum([0, *(len(part.records) for part in parts)])
        return cls(
            np.concatenate([part.records for part in parts]),
            np.concatenate([part.first_rows for part in parts]),
            np.concatenate([part.stop_rows for part in parts]),
            {
                int(start) + i: rows
                for start, part in zip(starts, parts, strict=False)
                for i, rows in part.chosen.items()
            },
        )

    def _slice(self, first: int, stop: int) -> "Part":
        own, indices = slice(first, stop), self._chosen_indices
        within = indices[bisect_left(indices, first) : bisect_left(indices, stop)]
        chosen = {index - first: self.chosen[index] for index in within}
        return Part(self.records[own], self.first_rows[own], self.stop_rows[own], chosen)


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
            starts = window_starts(part.sizes)
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
            indices.append(self.indices(window.part)[window.shuffled[chosen]])
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

    def whole(self, epoch: int) -> Part:
        """The records of an epoch, of which each rank reads a part."""
        shards = generator(self._seed, "shards", epoch).permutation(len(self._shards))
        records = np.concatenate([np.arange(self._first_record[s], self._first_record[s + 1]) for s in shards])
        return Part(records, np.zeros_like(records), self._record_images[records])

    def _new_part(self, rank: int, epoch: int) -> Part:
        return self.whole(epoch).between(self._stop(rank - 1), self._stop(rank))

    def _new_window(self, rank: int, epoch: int, number: int) -> Window:
        part = self.part(rank, epoch).window(number)
        draw = generator(self._seed, "stream", epoch, rank, self.ranks, number)
        shuffled = draw.permutation(part.images)
        return Window(part, shuffled, self.augmentation.draw(draw, part.images))

    def indices(self, part: Part) -> np.ndarray:
        """Indices in file order of the images of a part, in read order."""
        images = [
            np.arange(self._first_image[record], self._first_image[record + 1])[part.rows(index)]
            for index, record in enumerate(part.records)
        ]
        return np.concatenate(images)
