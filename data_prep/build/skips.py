"""What could not be used: counted by reason, listed by name, and never more than was agreed to."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.common.files import atomic_write
from data_prep.images.decode import BadImage

SKIPPED = "skipped.jsonl"
DAMAGED_TAR = "damaged tar"
JUDGED_AFTER = 10_000
"""Images of a stream after which a part is judged by its own share; its whole length is not known."""

Skip = dict[str, str]
"""One line of skipped.jsonl: split, name, reason, detail."""


def skip(split: str, bad: BadImage) -> Skip:
    """The line that says what became of a picture."""
    return {"split": split, "name": bad.name, "reason": bad.reason, "detail": bad.detail}


@dataclass
class SkipLimit:
    """Counts pictures and skips, and says when they are too many."""

    share: float
    """The largest share of the pictures, and of the tars, that may be skipped."""
    pictures_planned: int | None = None
    """All pictures of the whole job; None where streams don't say."""
    tars_planned: int = 0
    """All tars of the whole job."""
    pictures: int = 0
    skips: list[Skip] = field(default_factory=list)

    def add(self, pictures: int, skips: Iterable[Skip]) -> None:
        """Raises ValueError as soon as the whole job can't stay within the share any more."""
        self.take(pictures, skips)
        planned = self.pictures_planned
        if planned is None:
            planned = self.pictures if self.pictures >= JUDGED_AFTER else None
        self._check(planned, self.tars_planned)

    def take(self, pictures: int, skips: Iterable[Skip]) -> None:
        """Counts without judging."""
        self.pictures += pictures
        self.skips += skips

    def finish(self) -> None:
        """Raises ValueError if more than the share was skipped."""
        self._check(self.pictures, self.tars_planned)

    def _check(self, pictures: int | None, tars: int) -> None:
        damaged_tars = [one for one in self.skips if one["reason"] == DAMAGED_TAR]
        bad_pictures = [one for one in self.skips if one["reason"] != DAMAGED_TAR]
        for found, count, what in ((damaged_tars, tars, "tars"), (bad_pictures, pictures, "pictures")):
            if found and count is not None and len(found) > self.share * count:
                raise TooManySkips(self._sentence(found, f"{count:,} {what}"), self.skips)

    def _sentence(self, found: list[Skip], of: str) -> str:
        first = found[0]
        detail = f" ({first['detail']})" if first["detail"] else ""
        so_far = "so far " if self.pictures_planned is not None and self.pictures < self.pictures_planned else ""
        return (
            f"{so_far}{len(found):,} of {of} can't be used, more than max_skipped {self.share:g} allows; the first: "
            f"{first['name']} is {first['reason']}{detail}; repair or remove them, or raise --max_skipped"
        )


class TooManySkips(ValueError):
    """More skips than max_skipped allows; `skips` are those met so far. The sentence lacks its full stop."""

    def __init__(self, sentence: str, skips: list[Skip]) -> None:
        super().__init__(sentence)
        self.skips = skips


def counts_by_reason(skips: Iterable[Skip]) -> dict[str, dict[str, int]]:
    """{split: {reason: count}}, sorted: what the manifest says."""
    counts: dict[str, Counter[str]] = {}
    for one in skips:
        counts.setdefault(one["split"], Counter())[one["reason"]] += 1
    return {split: dict(sorted(found.items())) for split, found in sorted(counts.items())}


def write_skips(path: Path, skips: list[Skip]) -> None:
    """One JSON object a line; no file where nothing was skipped."""
    if not skips:
        path.unlink(missing_ok=True)
        return
    with atomic_write(path) as temporary, temporary.open("w") as file:
        file.writelines(json.dumps(one) + "\n" for one in skips)
