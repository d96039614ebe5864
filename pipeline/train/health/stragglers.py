"""Names ranks that are slower than their peers."""

from statistics import median

from pipeline.distributed import Ranks, gather
from pipeline.train.engine.base import Engine

SLOW = 1.5
"""Times the median of its peers' own time a step, and a rank is called slow."""


SLOW_STEPS = 50
"""Steps between two comparisons."""


class SlowRanks:
    """Names ranks that compute or read much longer than those that do the same work."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._steps, self._waited = ranks, 0, 0.0

    def check(self, engine: Engine, waited: float) -> str | None:
        """After each step, on all ranks; `waited`: seconds for data. Now and then a sentence, if a rank is slow."""
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
        return f"slow over the last {steps} steps: {'; '.join(slow)}" if slow else None
