"""Compares the weights of replicas."""

from collections import Counter

from pipeline.distributed import gather
from pipeline.train.engine.base import Engine
from pipeline.train.health.diverged import Diverged


class ReplicasDiffer(Diverged):
    """The weights of replicas differ."""


def check_replicas(engine: Engine, step: int) -> None:
    """Compares the weights of replicas. Raises ReplicasDiffer on every rank, naming the ranks that differ.

    Every rank calls it. Under ZeRO-1 and 2 each update gathers the weights again, so only differences that arose since
    the last update are found.
    """
    holdings = gather(engine.replica_checksums())
    for replica in dict.fromkeys(name for held in holdings for name in held):
        digests = {rank: held[replica] for rank, held in enumerate(holdings) if replica in held}
        (usual, times), *others = Counter(digests.values()).most_common()
        if others:
            differing = [rank for rank, digest in digests.items() if digest != usual]
            standing = "from the others" if times > len(differing) else f"from {len(digests) - len(differing)} others"
            raise ReplicasDiffer(
                f"at step {step} the weights of ranks {', '.join(map(str, differing))} differ {standing}, though they "
                f"are replicas: a device, its memory or a collective is faulty; step {step} was not saved, and "
                f"the last checkpoint is older."
            )
