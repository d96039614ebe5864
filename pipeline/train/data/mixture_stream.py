"""The order of a streamed set of a mixture: each data-parallel rank reads its own part of each epoch.

A rank reads the images of the set that fall to its lane of the mixture (the offsets that are its rank modulo the number
of ranks). How many these are in an epoch follows from the pattern, so the parts of an epoch have these sizes. If the
mixture or the number of ranks changes within an epoch, what all ranks have left of it is divided anew.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from data_prep.common.seeding import generator
from pipeline.model.augmentation import Augmentation, Changes
from pipeline.train.data.batches import WINDOW_RECORDS, window_starts
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
        self.part = lru_cache(maxsize=4)(self._new_part)
        self.window = lru_cache(maxsize=4)(self._new_window)
        self._parts = lru_cache(maxsize=4)(self._new_parts)

    @property
    def ranks(self) -> int:
        """Data-parallel ranks."""
        return self._history[-1].ranks or 1

    def slices(self, rank: int, position: int, count: int) -> Iterator[tuple[tuple[int, int], slice]]:
        """The windows (epoch, number) of `count` images of a rank, with a slice of each.

        position: of the first one among the images that all ranks read of the set.
        """
        epoch, stage = position // self.images, len(self._history) - 1
        in_part = int(self._lane_counts(stage, self._begin(stage, epoch), position)[rank])
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
        return any(self._remaining(stage, epoch) is None for stage in self._stages(epoch)[:-1])

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
        number, ranks, start = self._numbers[stage], self._history[stage].ranks, self._first[stage]
        assert number is not None and ranks is not None
        if self._history[stage].single:  # each rank has its own epochs; `_remaining` has checked that they are the same
            bounds = np.arange(ranks + 1) * self.images // ranks
            epoch = first // self.images
            full = np.diff(bounds)
            return full if stop == (epoch + 1) * self.images else stop // ranks - epoch * full
        return self._patterns[stage].by_lane(number, first - start, stop - start, ranks)

    def _new_parts(self, stage: int, epoch: int) -> tuple[Part, np.ndarray]:
        """The images of an epoch that a segment divides, and where each rank's part ends, int64 (ranks,)."""
        stages = self._stages(epoch)
        position = stages.index(stage)
        begin = self._begin(stage, epoch)
        whole = self._base.whole(epoch)
        remaining = whole if position == 0 else self._remaining(stages[position - 1], epoch)
        if remaining is None or position == 0:
            remaining = whole.between(begin - epoch * self.images, self.images)
        return remaining, np.cumsum(self._lane_counts(stage, begin, (epoch + 1) * self.images))

    def _part_of(self, stage: int, rank: int, epoch: int) -> Part:
        remaining, stops = self._parts(stage, epoch)
        return remaining.between(int(stops[rank - 1]) if rank else 0, int(stops[rank]))

    def _new_part(self, rank: int, epoch: int) -> Part:
        """The records that a rank reads in an epoch, in the last segment."""
        return self._part_of(len(self._history) - 1, rank, epoch)

    def _remaining(self, stage: int, epoch: int) -> Part | None:
        """What all ranks have left of an epoch when a segment ends in it; None if it did not divide the set so."""
        segment, number, stop = self._history[stage], self._numbers[stage], self._stop[stage]
        assert number is not None and stop is not None
        if not segment.members[number].streamed or segment.ranks is None:
            return None
        counts = self._lane_counts(stage, self._begin(stage, epoch), stop)
        sizes = np.diff(self._parts(stage, epoch)[1], prepend=0)
        if (counts < 0).any() or (counts > sizes).any():
            return None
        left = [self._left(stage, rank, epoch, int(counts[rank])) for rank in range(segment.ranks)]
        return Part.join(left)

    def _left(self, stage: int, rank: int, epoch: int, read: int) -> Part:
        """What a rank has left of its part after it has read some images, in read order."""
        part = self._part_of(stage, rank, epoch)
        if read == part.images:
            return part.between(0, 0)
        starts = window_starts(part.sizes)
        window = int(np.searchsorted(starts, read, side="right")) - 1
        shuffled = self._shuffled(stage, rank, epoch, window, part.window(window)).shuffled
        current = part.window(window).choose(np.sort(shuffled[read - int(starts[window]) :]))
        return Part.join([current, part.after(window)])

    def _new_window(self, rank: int, epoch: int, number: int) -> Window:
        stage = len(self._history) - 1
        return self._shuffled(stage, rank, epoch, number, self.part(rank, epoch).window(number))

    def _shuffled(self, stage: int, rank: int, epoch: int, number: int, part: Part) -> Window:
        segment = self._history[stage]
        purpose = (epoch, rank, segment.ranks or 0, number)
        if segment.single:
            draw = generator(self._seed, "stream", *purpose)
        else:
            draw = generator(self._seed, "mixture stream", segment.start, *purpose)
        shuffled = draw.permutation(part.images)
        return Window(part, shuffled, self.augmentation.draw(draw, part.images))
