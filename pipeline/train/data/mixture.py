"""The data order of a mixture, and its reader.

The pattern (mixture_pattern.py) says which set an image comes from. The k-th image of a local set is the one that the
set alone would give at its position k. A streamed set is divided among the ranks (mixture_stream.py). The history
(mixture_history.py) says how many images of each set were read before.
"""

import hashlib

import numpy as np

from data_prep.shards.reader import Split
from pipeline.model.augmentation import Augmentation
from pipeline.model.masks import Batch
from pipeline.train.data.batches import STREAMED, ImageOrder, ReadAhead
from pipeline.train.data.mixture_history import History
from pipeline.train.data.mixture_pattern import BLOCK
from pipeline.train.data.mixture_stream import MixtureStream
from pipeline.train.data.stream_order import StreamOrder
from pipeline.train.data.streaming import StreamedBatches
from pipeline.training_set import TrainingSets

MIXTURE = "mixture/"
"""Prefix of the fingerprint of a mixture's order; those of the pattern and of each set follow."""


class MixtureOrder:
    """Maps positions of the last segment of a history to images of its sets."""

    def __init__(
        self,
        history: History,
        sets: TrainingSets,
        seed: int,
        augmentation: Augmentation | None = None,
        recorded: History | None = None,
    ) -> None:
        """recorded: the history that the checkpoint has from which the run resumes; None without one."""
        self.history, self._sets, self._seed = history, sets, seed
        self._recorded = history if recorded is None else recorded
        self.augmentation = augmentation or Augmentation()
        self._segment = history[-1]
        self._pattern = self._segment.pattern(seed)
        self.splits: list[Split] = [one.shards.split("train") for one in sets.sets]
        members = [member.digest for member in self._segment.members]
        self._members = [members.index(digest) for digest in sets.digests]
        """Of each set the number that it has in the pattern."""
        self._numbers = np.argsort(self._members)
        self._skipped = [
            self._pattern.count(member, self._segment.start) - self._segment.consumed.get(digest, 0)
            for member, digest in zip(self._members, sets.digests, strict=True)
        ]
        """Images of each set in the pattern before the segment, less those that were really read of it."""
        self._starts = np.cumsum([0, *(split.images for split in self.splits)])
        self.orders = [
            ImageOrder(split.record_images, seed, self.augmentation)
            if split.address is None
            else MixtureStream(history, digest, _records(split), seed, self.augmentation)
            for split, digest in zip(self.splits, sets.digests, strict=True)
        ]

    def sets_at(self, position: int, count: int) -> np.ndarray:
        """The number of the set of each image at positions [position, position + count)."""
        return self._numbers[self._pattern.at(position, count)]

    def read_of_set(self, number: int, position: int) -> int:
        """Images of a set that are read when `position` images are, in total."""
        assert position >= self._segment.start
        return self._pattern.count(self._members[number], position) - self._skipped[number]

    def image_numbers(self, position: int, count: int) -> list[int]:
        """The indices of the images in the training images of all sets, set by set, each in file order."""
        numbers, of_set = np.empty(count, np.int64), self.sets_at(position, count)
        for number in np.unique(of_set):
            places, first, order = (
                np.flatnonzero(of_set == number),
                self.read_of_set(number, position),
                self.orders[number],
            )
            if isinstance(order, ImageOrder):
                numbers[places] = order.at(first, len(places))[0] + self._starts[number]
                continue
            ranks = self._segment.ranks or 1
            lanes = (position - self._segment.start + places) % ranks
            for rank in np.unique(lanes):
                own = np.flatnonzero(lanes == rank)
                found = order.at(int(rank), first + int(own[0]), len(own))[0]
                numbers[places[own]] = found + self._starts[number]
        return [int(number) for number in numbers]

    def epochs(self, position: int) -> dict[str, float]:
        """Epochs of each set when `position` images are read, by its name."""
        read = [self.read_of_set(number, position) / split.images for number, split in enumerate(self.splits)]
        return {one.name: epochs for one, epochs in zip(self._sets.sets, read, strict=True)}

    def fingerprint(self, position: int) -> str:
        """A digest of the pattern from `position` on, and one of each set's own next images."""
        own = [
            f"{digest[:16]}={STREAMED * isinstance(order, MixtureStream)}"
            f"{order.fingerprint(self.read_of_set(number, position))}"
            for number, (digest, order) in enumerate(zip(self._sets.digests, self.orders, strict=True))
        ]
        return f"{MIXTURE}{self._next_sets(self.history, position)}/{','.join(own)}"

    def resume_warning(self, recorded: str, position: int) -> str | None:
        """None if a set's order or the pattern is another one than recorded; else a warning, empty if all is exact.

        recorded: the fingerprint of a mixture, or of a run of data.shards.
        """
        if recorded.startswith(MIXTURE):
            pattern, _, own = recorded.removeprefix(MIXTURE).partition("/")
            if pattern != self._next_sets(self._recorded, position):
                return None
            before = dict(one.split("=") for one in own.split(","))
        else:
            before = {self._recorded[0].members[0].digest[:16]: recorded}
        weaker = []
        for number, digest in enumerate(self._sets.digests):
            if (found := before.get(digest[:16])) is None:
                continue
            if not found.endswith(self._expected(number, found, position)):
                return None
            order, first = self.orders[number], self.read_of_set(number, position)
            if order.weakened(first) if isinstance(order, MixtureStream) else found.startswith(STREAMED):
                weaker.append(self._sets.sets[number].name)
        if not weaker:
            return ""
        return (
            f"{', '.join(weaker)} was read in another kind of order before (streamed, or by index); until the end of "
            f"its epoch some images are read twice and others are skipped"
        )

    def _expected(self, number: int, recorded: str, position: int) -> str:
        """The end of the fingerprint that a set had if its order is still the same."""
        split, read = self.splits[number], self.read_of_set(number, position)
        if not recorded.startswith(STREAMED):
            return ImageOrder(split.record_images, self._seed, self.augmentation).fingerprint(read)
        if self._recorded[-1].single:
            ranks = int(recorded.removeprefix(STREAMED).partition("/")[0])
            return StreamOrder(_records(split), self._seed, ranks, self.augmentation).fingerprint(position)
        digest = self._sets.digests[number]
        return MixtureStream(self._recorded, digest, _records(split), self._seed, self.augmentation).fingerprint(read)

    def _next_sets(self, history: History, position: int) -> str:
        """Digest of the sets of the next images, in the last segment of a history."""
        of_set = history[-1].pattern(self._seed).at(position, BLOCK)
        digests = [member.digest for member in history[-1].members]
        return hashlib.sha256(" ".join(digests[number] for number in of_set).encode()).hexdigest()[:16]


def _records(split: Split) -> list[list[int]]:
    return [shard["record_images"] for shard in split.shards]


class MixtureBatches(ReadAhead):
    """Reads a data-parallel rank's share of each batch of a mixture: every ranks-th image, from the rank-th on."""

    def __init__(self, order: MixtureOrder, resolution: int, rank: int, ranks: int) -> None:
        super().__init__()
        self._order, self._rank, self._ranks = order, rank, ranks
        self._resolution = resolution
        self._streams = {
            number: StreamedBatches(order.splits[number], resolution, own, rank)
            for number, own in enumerate(order.orders)
            if isinstance(own, MixtureStream)
        }

    def close(self) -> None:
        """Stops the reading threads, without waiting for a connection that may hang."""
        for stream in self._streams.values():
            stream.close()
        self._stop(wait=not self._streams)

    def _read(self, position: int, global_size: int) -> Batch:
        of_set = self._order.sets_at(position, global_size)
        own_sets = of_set[self._rank :: self._ranks]
        tokens = np.empty((len(own_sets), self._resolution**2), np.uint16)
        for number in np.unique(own_sets):
            places = np.flatnonzero(of_set == number)
            own = np.flatnonzero(places % self._ranks == self._rank)
            first = self._order.read_of_set(number, position)
            tokens[own_sets == number] = self._read_set(int(number), first, own)
        return Batch(tokens)

    def _read_set(self, number: int, first: int, own: np.ndarray) -> np.ndarray:
        """uint16 (n, T): the images of a set that are `own` positions after its image `first`."""
        order = self._order.orders[number]
        if isinstance(order, MixtureStream):
            return self._streams[number].read(first + int(own[0]), len(own))
        indices, changes = order.at(first, int(own[-1]) + 1)
        tokens = self._order.splits[number].gather_tokens(indices[own])
        return order.augmentation.apply(tokens, changes[own], self._resolution)
