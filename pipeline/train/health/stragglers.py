"""Finds ranks that are slower than their peers."""

from statistics import median

from pipeline.distributed import Ranks, gather
from pipeline.train.engine.base import Engine

SLOW = 1.5
"""A rank is slow if its own time a step exceeds the median of its peers by this factor."""

SLOW_STEPS = 50
"""Steps between two comparisons."""


class SlowRanks:
    """Finds ranks that compute or read much longer than ranks with the same work."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._steps, self._waited = ranks, 0, 0.0

    def check(self, engine: Engine, waited: float) -> str | None:
        """Call after each step on all ranks. Every SLOW_STEPS steps, a message if a rank is slow.

        waited: seconds for which this rank waited for data.
        """
        self._steps, self._waited = self._steps + 1, self._waited + waited
        if self._steps < SLOW_STEPS:
            return None
        own = gather((engine.work, engine.forward_seconds(), self._waited))
        steps, self._steps, self._waited = self._steps, 0, 0.0
        slow = []
        for rank, (work, forward, waiting) in enumerate(own):
            peers = [their[1] + their[2] for other, their in enumerate(own) if their[0] == work and other != rank]
            if peers and forward + waiting > SLOW * median(peers):
                slow.append(
                    f"rank {rank} took {(forward + waiting) / steps:.3f} s a step ({waiting / steps:.3f} s waiting for "
                    f"data), its peers' median is {median(peers) / steps:.3f} s"
                )
        return f"slow ranks over the last {steps} steps: {'; '.join(slow)}" if slow else None
