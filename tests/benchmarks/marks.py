"""Whether ours reaches the mark that is set against the best peer of a table."""

from collections.abc import Sequence
from statistics import median

from tests.benchmarks.peers.measure import Measured


def against(mark: float, measured: Sequence[Measured], figure: str, *, more_is_better: bool) -> str:
    """A sentence's part: ours, the first, against the best of the others that ran, by the medians of a figure.

    mark: how many times better than the best peer ours should be; 1 for not worse.
    """
    ours, *peers = measured
    ran = [(median(peer.turns[figure]), peer.script.name) for peer in peers if peer.error is None]
    if ours.error is not None or not ran:
        return "nothing to compare"
    best, name = max(ran) if more_is_better else min(ran)
    own = median(ours.turns[figure])
    times = own / best if more_is_better else best / own
    reached = "reached" if times >= mark else "missed"
    return f"{times:.2f} times as good as the best peer, {name} (mark {mark:g}: {reached})"
