"""The history of a run's mixtures: from it follows how many images of each set a run has read at any position.

A checkpoint stores it. A resume with other sets or weights, or with another number of data-parallel ranks if a set is
streamed, begins a new segment at the images seen.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.config import WEIGHT_PARTS
from pipeline.train.data.batches import STREAMED
from pipeline.train.data.mixture_pattern import Pattern, pattern_of, weight_parts
from pipeline.training_set import TrainingSets


@dataclass(frozen=True)
class Member:
    """A set of a segment."""

    digest: str
    name: str
    parts: int
    """Its millionths of the images."""
    streamed: bool
    source: str = ""
    """Name of its dataset."""

    @property
    def share(self) -> str:
        """Its share of the images, for messages."""
        return f"{self.parts / WEIGHT_PARTS:g}"


@dataclass(frozen=True)
class Segment:
    """Images that are read with one mixture."""

    start: int
    """The first image's position."""
    members: tuple[Member, ...]
    """In the order of their digests."""
    consumed: dict[str, int]
    """Images of each set that the run had read before, by digest; also of sets that are no longer in the mixture."""
    ranks: int | None
    """Data-parallel ranks, if a set is streamed: its images are divided among them."""
    single: bool = False
    """Whether it was a run of data.shards: streamed, each rank had an equal part of an epoch."""

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "Segment":
        """From the content of checkpoint.json."""
        return cls(**plain | {"members": tuple(Member(**member) for member in plain["members"])})

    def pattern(self, seed: int) -> Pattern:
        """Which set each image comes from, by its position in the run; it does not restart where the ranks change."""
        return pattern_of(seed, tuple(member.parts for member in self.members))

    def consumed_at(self, position: int, seed: int) -> dict[str, int]:
        """Images of each set that are read when `position` images are, in total; position: from `start` on."""
        pattern = self.pattern(seed)
        read = {
            member.digest: pattern.count(number, position) - pattern.count(number, self.start)
            for number, member in enumerate(self.members)
        }
        return self.consumed | {digest: self.consumed.get(digest, 0) + count for digest, count in read.items()}


History = tuple[Segment, ...]


def history_of(recorded: Sequence[dict[str, Any]], digest: str, fingerprint: str) -> History:
    """The history that a checkpoint has; of a run of data.shards, a single segment.

    recorded: its `mixture`. digest, fingerprint: of its shard set and order.
    """
    if recorded:
        return tuple(map(Segment.from_dict, recorded))
    ranks = int(fingerprint.removeprefix(STREAMED).partition("/")[0]) if fingerprint.startswith(STREAMED) else None
    member = Member(digest, "data.shards", weight_parts([1.0])[0], ranks is not None)
    return (Segment(0, (member,), {}, ranks, single=True),)


def continued(history: History, sets: TrainingSets, ranks: int, position: int, seed: int) -> History:
    """The history of a run that reads these sets from `position` on; the same one if nothing has changed.

    ranks: data-parallel ranks. An empty history is that of a new run.
    """
    ordered = sorted(sets.sets, key=lambda one: one.shards.digest)  # their order in data.mixture does not matter
    parts = weight_parts([one.weight for one in ordered])
    members = tuple(
        Member(one.shards.digest, one.name, part, one.shards.address is not None, one.shards.name)
        for one, part in zip(ordered, parts, strict=True)
    )
    lanes = ranks if sets.streamed else None
    if not history:
        return (Segment(position, members, {}, lanes),)
    last = history[-1]
    if not last.single and (_key(last.members), last.ranks) == (_key(members), lanes):
        return history
    before = tuple(segment for segment in history if segment.start < position)
    return (*before, Segment(position, members, last.consumed_at(position, seed), lanes))


def _key(members: Sequence[Member]) -> list[tuple[str, int, bool]]:
    return [(member.digest, member.parts, member.streamed) for member in members]


def to_record(history: History) -> list[dict[str, Any]]:
    """The history as plain lists and dicts, for checkpoint.json."""
    return [asdict(segment) for segment in history]


def describe_change(before: Segment, after: Segment) -> str:
    """One line: what changes from the next image on, and how many images of each set the run has read."""
    old = {member.digest: member for member in before.members}
    new = {member.digest: member for member in after.members}
    names = {digest: digest[:12] for digest in after.consumed} | {one.digest: one.name for one in (old | new).values()}
    changes = []
    for digest, name in sorted(names.items(), key=lambda item: item[1]):
        shares = [one[digest].share for one in (old, new) if digest in one]
        if len(shares) == 1:
            changes.append(f"{name} {shares[0]} {'added' if digest in new else 'removed'}")
        elif len(set(shares)) == 2:
            changes.append(f"{name} {shares[0]} -> {shares[1]}")
    if not changes:
        changes = ["the weights stay" + (f", {after.ranks} data-parallel ranks stream" if after.ranks else "")]
    read = ", ".join(sorted(f"{names[digest]} {count:,}" for digest, count in after.consumed.items()))
    return f"the mixture changes from image {after.start:,} on: {', '.join(changes)}; images read so far: {read}"
