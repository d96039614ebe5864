"""What the summary has of a work: ours beside the best peer, the mark that is set, and what the machine allows."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from statistics import median

from tests.benchmarks.peers.measure import Measured, cell, shown, values

HEAD = (
    "| work | unit | ours | best peer | its figure | times as good | mark | limit | share of the limit |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Result:
    """One work. A figure is None where it could not be measured."""

    work: str
    unit: str
    ours: float | None
    peer: str
    """The best of those that ran, and which failed; empty if none ran, or if there is none to compare with."""
    theirs: float | None = None
    more_is_better: bool = True
    mark: float | None = None
    """How many times as good as the best peer ours should be: 1 for not worse. None: no mark is set."""
    limit: float | None = None
    """The figure that the hardware would allow at best."""
    limited_by: str = ""
    """What the limit was computed from."""
    problem: str = ""
    """Why ours has no figure."""

    @property
    def times(self) -> float | None:
        """How many times as good as the best peer ours is."""
        if self.ours is None or self.theirs is None:
            return None
        own, other = (self.ours, self.theirs) if self.more_is_better else (self.theirs, self.ours)
        return own / other if other else inf if own else 1.0

    def _times(self) -> str:
        return "" if self.times is None else f"{self.times:.2f}".replace("inf", "∞")

    @property
    def share(self) -> float | None:
        """Of the limit, which ours reaches."""
        if not self.ours or not self.limit:
            return None
        return self.ours / self.limit if self.more_is_better else self.limit / self.ours

    @property
    def verdict(self) -> str:
        """Whether the mark is reached; empty without a mark or a figure."""
        if self.mark is None or self.times is None:
            return ""
        return "reached" if self.times >= self.mark else "missed"

    def sentence(self) -> str:
        """For the part's page."""
        if self.ours is None:
            return f"{self.work}: ours fails: {self.problem}."
        text = f"{self.work}: {shown(self.ours)} {self.unit}"
        if self.times is None:
            text += ", nothing to compare"
        else:
            text += f", {self._times()} times as good as the best peer, {self.peer}: {shown(self.theirs or 0)}"
        if self.verdict:
            text += f"; mark {self.mark:g}: {self.verdict}"
        if self.share is not None:
            text += f"; {self.limited_by} would allow {shown(self.limit or 0)}, ours reach {self.share:.0%}"
        return f"{text}."

    def line(self) -> str:
        """Of the table whose head is HEAD."""
        figures = ("" if one is None else shown(one) for one in (self.ours, self.theirs))
        ours, theirs = figures
        mark = "" if self.mark is None else f"{self.mark:g}: {self.verdict or 'not measured'}"
        limit = "" if self.limit is None else f"{shown(self.limit)} ({self.limited_by})"
        times = self._times()
        share = "" if self.share is None else f"{self.share:.0%}"
        ours = ours or f"fails: {self.problem}"
        cells = (self.work, self.unit, ours, self.peer, theirs, times, mark, limit, share)
        return f"| {' | '.join(map(cell, cells))} |"


@dataclass(frozen=True)
class Growth:
    """How a cost grows: its figures at each size, and the exponent of the last step; 1 is linear."""

    work: str
    at: str
    """What the smallest size is."""
    factors: Sequence[int]
    costs: Sequence[float]
    exponent: float


def result(
    work: str,
    unit: str,
    measured: Sequence[Measured],
    figure: str = "rate",
    *,
    mark: float | None,
    more_is_better: bool = True,
    limit: float | None = None,
    limited_by: str = "",
) -> Result:
    """Of the medians of a figure; `measured` has ours first, then the peers.

    figure: a name in `turns`, or `rate` and `cpu_rate` for work a second and a CPU-second.
    """
    ours, *peers = measured
    ran = [(median(found), peer.script.name) for peer in peers if (found := values(peer, figure))]
    best, name = (max(ran) if more_is_better else min(ran)) if ran else (None, "")
    failed = [peer.script.name for peer in peers if peer.error is not None]
    name += f"{' ' * bool(name)}({', '.join(failed)} failed)" if failed else ""
    own = values(ours, figure)
    problem = "" if own else ours.error or f"{figure} was not measured"
    return Result(
        *(work, unit, median(own) if own else None, name, best, more_is_better, mark, limit, limited_by, problem)
    )
