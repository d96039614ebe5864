"""Images and tars that are not stored: counted by reason, listed by name, and limited by max_skipped.

Near-duplicates are listed too, but not limited. What source.where excludes is only counted: it may be most images.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.common.files import atomic_write, to_json
from data_prep.images.decode import BadImage
from data_prep.sources.where import UNLISTED

SKIPPED = "skipped.jsonl"
DAMAGED_TAR = "damaged tar"
NEAR_DUPLICATE = "near-duplicate"
"""Listed, but not limited by max_skipped: these images can be used, and are excluded on request."""
CHECKED_AFTER = 10_000
"""Images of streams after which a part checks its own share of skips; the total number of images is unknown."""

Skip = dict[str, str]
"""One line of skipped.jsonl: split, name, reason, detail."""


def skip(split: str, bad: BadImage) -> Skip:
    """The line of skipped.jsonl for an image."""
    return {"split": split, "name": bad.name, "reason": bad.reason, "detail": bad.detail}


@dataclass
class Processed:
    """What was read of a stream, and not stored."""

    split: str
    """Of the source."""
    images: int = 0
    """Images, without those that source.where excludes."""
    skips: list[Skip] = field(default_factory=list)
    filtered: Counter[str] = field(default_factory=Counter)
    """By reason, the images that source.where excludes."""

    def skip(self, bad: BadImage) -> None:
        if bad.reason in UNLISTED:
            self.filtered[bad.reason] += 1
            return
        self.skips.append(skip(self.split, bad))
        self.images += bad.reason != DAMAGED_TAR


@dataclass
class SkipCount:
    """Skips, counted by reason. Its text names the first."""

    first: Skip | None = None
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, one: Skip) -> None:
        self.first = self.first or one
        self.reasons[one["reason"]] += 1

    def merge(self, later: "SkipCount") -> None:
        self.first = self.first or later.first
        self.reasons += later.reasons

    def __str__(self) -> str:
        """As in "the first is a.jpg: empty (0 bytes); by reason: 2 empty, 1 damaged"; nothing without skips."""
        if self.first is None:
            return ""
        detail = f" ({self.first['detail']})" if self.first["detail"] else ""
        counts = ", ".join(f"{count:,} {reason}" for reason, count in self.reasons.most_common())
        by_reason = f"; by reason: {counts}" if len(self.reasons) > 1 else ""
        return f"the first is {self.first['name']}: {self.first['reason']}{detail}{by_reason}"


def count_skips(skips: Iterable[Skip]) -> SkipCount:
    count = SkipCount()
    for one in skips:
        count.add(one)
    return count


@dataclass
class SkipLimit:
    """Counts source images and skips. Raises TooManySkips when the skips exceed the share."""

    share: float
    """The largest share of the images, and of the tars, that may be skipped."""
    images_planned: int | None = None
    """Number of source images of the entire job; None for streams, as it is unknown."""
    tars_planned: int = 0
    """Number of tars of the entire job."""
    images: int = 0
    skips: list[Skip] = field(default_factory=list)

    def add(self, images: int, skips: Iterable[Skip]) -> None:
        """Counts, and raises TooManySkips as soon as the entire job can no longer stay within the share."""
        self.count(images, skips)
        planned = self.images_planned
        if planned is None:
            planned = self.images if self.images >= CHECKED_AFTER else None
        self._check(planned, self.tars_planned)

    def count(self, images: int, skips: Iterable[Skip]) -> None:
        """Counts without checking the share."""
        self.images += images
        self.skips += skips

    def finish(self) -> None:
        """Raises TooManySkips if more than the share was skipped."""
        self._check(self.images, self.tars_planned)

    def _check(self, images: int | None, tars: int) -> None:
        damaged_tars = [one for one in self.skips if one["reason"] == DAMAGED_TAR]
        bad_images = [one for one in self.skips if one["reason"] not in (DAMAGED_TAR, NEAR_DUPLICATE)]
        for found, count, what in ((damaged_tars, tars, "tars"), (bad_images, images, "images")):
            if found and count is not None and len(found) > self.share * count:
                raise TooManySkips(self._sentence(found, f"{count:,} {what}"), self.skips)

    def _sentence(self, found: list[Skip], of: str) -> str:
        so_far = "so far " if self.images_planned is not None and self.images < self.images_planned else ""
        return (
            f"{so_far}{len(found):,} of {of} can't be used, more than max_skipped {self.share:g} allows; "
            f"{count_skips(found)}; repair or remove them, or raise --max_skipped"
        )


class TooManySkips(ValueError):
    """More skips than max_skipped allows. `skips` has the skips so far. The sentence has no full stop yet."""

    def __init__(self, sentence: str, skips: list[Skip]) -> None:
        super().__init__(sentence)
        self.skips = skips


def counts_by_reason(skips: Iterable[Skip]) -> dict[str, dict[str, int]]:
    """{split: {reason: count}}, sorted, for the manifest."""
    counts: dict[str, Counter[str]] = {}
    for one in skips:
        counts.setdefault(one["split"], Counter())[one["reason"]] += 1
    return {split: dict(sorted(found.items())) for split, found in sorted(counts.items())}


def add_counts(*counts: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """The sums of {split: {reason: count}}, sorted."""
    sums: dict[str, Counter[str]] = {}
    for one in counts:
        for split, reasons in one.items():
            sums.setdefault(split, Counter()).update(reasons)
    return {split: dict(sorted(found.items())) for split, found in sorted(sums.items())}


def write_skips(path: Path, skips: list[Skip]) -> None:
    """Writes one JSON object per line; removes the file if nothing was skipped."""
    if not skips:
        path.unlink(missing_ok=True)
        return
    with atomic_write(path) as temporary, temporary.open("w") as file:
        file.writelines(to_json(one) + "\n" for one in skips)
