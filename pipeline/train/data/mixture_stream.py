"""The order of a streamed set of a mixture: each data-parallel rank reads its own part of each epoch.

A rank reads the images of the set that fall to its lane of the mixture (the positions from the segment's start on that
are its rank modulo the number of ranks). How many these are in an epoch follows from the pattern, so the parts of an
epoch have these sizes. If the mixture or the number of ranks changes within an epoch, what all ranks have left of it is
divided anew.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from data_prep.common.seeding import generator
from pipeline.model.augmentation import Augmentation, Changes
from pipeline.train.data.batches import FINGERPRINT_IMAGES, WINDOW_RECORDS, window_starts
from pipeline.train.data.mixture_history import History
from pipeline.train.data.mixture_pattern import Pattern
from pipeline.train.data.stream_order import Part, StreamOrder, Window


class MixtureStream:
    """Maps the images that a rank reads of one streamed set to images of the set, in the last segment of a history."""

    def __init__(
        self,
        history: History,
        digest: str,
        shards: Sequence[Sequence[int] | np.ndarray],
        seed: int,
        augmentation: Augmentation | None = None,
    ) -> None:
        """digest: of the set. shards: for each of its shards, the number of images in each record."""
        self._history, self._digest, self._seed = history, digest, seed
        self._base = StreamOrder(shards, seed, 1, augmentation)
        self._shards = shards
        self.augmentation = self._base.augmentation
        self.images = self._base.images
        self._patterns: list[Pattern] = [segment.pattern(seed) for segment in history]
        self._numbers = [
            next((number for number, member in enumerate(segment.members) if member.digest == digest), None)
            for segment in history
        ]
        starts = [segment.consumed.get(digest, 0) for segment in history]
        self._first, self._stop = starts, [*starts[1:], None]
        """The set's images that each segment reads; None: without end."""
        self._skipped = [
            0 if number is None else pattern.count(number, segment.start) - start
            for segment, pattern, number, start in zip(history, self._patterns, self._numbers, starts, strict=True)
        ]
        """Images of the set in each segment's pattern before the segment, less those that were really read."""
        self.part = lru_cache(maxsize=4)(self._new_part)
        self.window = lru_cache(maxsize=4)(self._new_window)
        self._undivided = lru_cache(maxsize=2)(self._new_undivided)
        self._stops = lru_cache(maxsize=64)(self._new_stops)

    @property
    def ranks(self) -> int:
        """Data-parallel ranks."""
        return self._history[-1].ranks or 1

    def meets(self, rank: int) -> bool:
        """Whether a rank ever reads an image of the set: of a small share of the mixture, some ranks may read none."""
        number, segment = self._numbers[-1], self._history[-1]
        assert number is not None
        return self._patterns[-1].meets(number, (rank + segment.start) % self.ranks, self.ranks)

    def fingerprint(self, position: int) -> str:
        """Digest of the next images of the first and last rank that read any, as of a run of the set alone.

        position: images that all ranks have read of the set.
        """
        digest = hashlib.sha256()
        for rank in sorted({0, self.ranks - 1}):
            if self.meets(rank):
                indices, changes = self.at(rank, position, FINGERPRINT_IMAGES)
                digest.update(indices.tobytes() + self.augmentation.bytes_of(changes))
        return digest.hexdigest()[:16]

    def _in_lane(self, rank: int, position: int) -> int:
        """How many of the set's images a rank reads in the last segment before one, and in its pattern before that."""
        number, segment = self._numbers[-1], self._history[-1]
        assert number is not None
        images, lane = position + self._skipped[-1], (rank + segment.start) % self.ranks
        return self._patterns[-1].in_lane(number, images, lane, self.ranks)

    def slices(self, rank: int, position: int, count: int) -> Iterator[tuple[tuple[int, int], slice]]:
        """The windows (epoch, number) of `count` images of a rank, with a slice of each.

        position: of the first one among the images that all ranks read of the set.
        """
        epoch, stage = position // self.images, len(self._history) - 1
        in_part = self._in_lane(rank, position) - self._in_lane(rank, self._begin(stage, epoch))
        assert not count or self.meets(rank)
        while count:
            part = self.part(rank, epoch)
            if in_part >= part.images:
                epoch, in_part = epoch + 1, 0
                continue
            window = int(np.searchsorted(window_starts(part.sizes), in_part, side="right")) - 1
            first = in_part - int(window_starts(part.sizes)[window])
            taken = min(count, len(self.window(rank, epoch, window).shuffled) - first)
            yield (epoch, window), slice(first, first + taken)
            in_part, count = in_part + taken, count - taken

    def following(self, rank: int, epoch: int, window: int) -> tuple[int, int]:
        """The epoch and number of the window after this one."""
        if (window + 1) * WINDOW_RECORDS < len(self.part(rank, epoch).records):
            return epoch, window + 1
        assert self.meets(rank)
        epoch += 1
        while not self.part(rank, epoch).images:
            epoch += 1
        return epoch, 0

    def at(self, rank: int, position: int, count: int) -> tuple[np.ndarray, Changes]:
        """As `slices`: int64 indices in file order, and augmentations."""
        indices, changes = [], []
        for key, chosen in self.slices(rank, position, count):
            window = self.window(rank, *key)
            indices.append(self._base.indices(window.part)[window.shuffled[chosen]])
            changes.append(window.changes[chosen])
        return np.concatenate(indices), Changes.join(changes)

    def weakened(self, position: int) -> bool:
        """Whether images of the epoch at `position` are read twice or not at all: it began in another kind of order."""
        epoch, before = position // self.images, len(self._history) - 2
        if before >= 0 and self._history[before].single and self._stop[before] == epoch * self.images:
            ranks = self._history[before].ranks  # a rank with a larger part may be behind the epoch's end
            return ranks is not None and bool(self._lane_counts(before, position, position).any())
        return any(self._read_by_ranks(stage, epoch) is None for stage in self._stages(epoch)[:-1])

    def _begin(self, stage: int, epoch: int) -> int:
        """The first image of the set in an epoch that a segment reads."""
        return max(epoch * self.images, self._first[stage])

    def _stages(self, epoch: int) -> list[int]:
        """The segments that read images of an epoch; the last one, which is without end, always counts."""
        first, stop = epoch * self.images, (epoch + 1) * self.images
        return [
            number
            for number, (start, end) in enumerate(zip(self._first, self._stop, strict=True))
            if end is None or (self._numbers[number] is not None and max(start, first) < min(end, stop))
        ]

    def _lane_counts(self, stage: int, first: int, stop: int) -> np.ndarray:
        """Of the set's images [first, stop), how many each rank of a segment reads."""
        number, ranks, skipped = self._numbers[stage], self._history[stage].ranks, self._skipped[stage]
        assert number is not None and ranks is not None
        if self._history[stage].single:  # each rank has its own epochs; `_read_by_ranks` checks that they are the same
            bounds = np.arange(ranks + 1) * self.images // ranks
            epoch = first // self.images
            full = np.diff(bounds)
            return full if stop == (epoch + 1) * self.images else stop // ranks - epoch * full
        counts = self._patterns[stage].by_lane(number, first + skipped, stop + skipped, ranks)
        return np.roll(counts, -self._history[stage].start)  # ranks are counted from the segment's start

    def _new_undivided(self, stage: int, epoch: int) -> Part:
        """The images of an epoch that a segment divides."""
        stages, first = self._stages(epoch), self._begin(stage, epoch) - epoch * self.images
        before = stages.index(stage) - 1
        if before < 0 or (read := self._read_by_ranks(stages[before], epoch)) is None:
            return self._base.whole(epoch).between(first, self.images)
        return Part.join([self._left(stages[before], rank, epoch, int(count)) for rank, count in enumerate(read)])

    def _new_stops(self, stage: int, epoch: int) -> np.ndarray:
        """Where each rank's part of an epoch ends, int64 (ranks,)."""
        return np.cumsum(self._lane_counts(stage, self._begin(stage, epoch), (epoch + 1) * self.images))

    def _part_of(self, stage: int, rank: int, epoch: int) -> Part:
        stops = self._stops(stage, epoch)
        return self._undivided(stage, epoch).between(int(stops[rank - 1]) if rank else 0, int(stops[rank]))

    def _new_part(self, rank: int, epoch: int) -> Part:
        """The records that a rank reads in an epoch, in the last segment."""
        return self._part_of(len(self._history) - 1, rank, epoch)

    def _read_by_ranks(self, stage: int, epoch: int) -> np.ndarray | None:
        """What each rank has read of an epoch when a segment ends in it; None if it did not divide the set so."""
        segment, number, stop = self._history[stage], self._numbers[stage], self._stop[stage]
        assert number is not None and stop is not None
        if not segment.members[number].streamed or segment.ranks is None:
            return None
        read = self._lane_counts(stage, self._begin(stage, epoch), stop)
        is_divided = (read >= 0).all() and (read <= np.diff(self._stops(stage, epoch), prepend=0)).all()
        return read if is_divided else None

    def _left(self, stage: int, rank: int, epoch: int, read: int) -> Part:
        """What a rank has left of its part after it has read some images, in read order."""
        part = self._part_of(stage, rank, epoch)
        if read in (0, part.images):
            return part.between(read, part.images)
        starts = window_starts(part.sizes)
        window = int(np.searchsorted(starts, read, side="right")) - 1
        shuffled = self._draw(stage, rank, epoch, window).permutation(part.window(window).images)
        current = part.window(window).choose(np.sort(shuffled[read - int(starts[window]) :]))
        return Part.join([current, part.after(window)])

    def _new_window(self, rank: int, epoch: int, number: int) -> Window:
        part = self.part(rank, epoch).window(number)
        draw = self._draw(len(self._history) - 1, rank, epoch, number)
        shuffled = draw.permutation(part.images)
        return Window(part, shuffled, self.augmentation.draw(draw, part.images))

    def _draw(self, stage: int, rank: int, epoch: int, window: int) -> np.random.Generator:
        """Shuffles a window, then draws its augmentations."""
        segment = self._history[stage]
        purpose = (epoch, rank, segment.ranks or 0, window)
        if segment.single:
            return generator(self._seed, "stream", *purpose)
        return generator(self._seed, "mixture stream", segment.start, *purpose)
