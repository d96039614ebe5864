"""Compares the weights of ranks that should hold the same."""

from collections import Counter

from pipeline.distributed import gather
from pipeline.train.engine.base import Engine
from pipeline.train.health.diverged import Diverged


class ReplicasDiffer(Diverged):
    """Ranks that should hold the same weights do not."""


def check_replicas(engine: Engine, step: int) -> None:
    """Compares the weights of ranks that should hold the same. Raises ReplicasDiffer on every rank, naming the odd.

    Every rank calls it. Under ZeRO-1 and 2 each update gathers the weights anew, so what is found there is what went
    wrong since the last update.
    """
    holdings = gather(engine.replica_checksums())
    for replica in dict.fromkeys(name for held in holdings for name in held):
        digests = {rank: held[replica] for rank, held in enumerate(holdings) if replica in held}
        (usual, times), *others = Counter(digests.values()).most_common()
        if others:
            odd = [rank for rank, digest in digests.items() if digest != usual]
            standing = "from the others" if times > len(odd) else f"from {len(digests) - len(odd)} others"
            raise ReplicasDiffer(
                f"at step {step} the weights of ranks {', '.join(map(str, odd))} differ {standing}, though all should "
                f"hold the same: a device or its memory fails, or a collective went wrong; nothing was saved since, "
                f"and the last checkpoint is from before step {step}."
            )
