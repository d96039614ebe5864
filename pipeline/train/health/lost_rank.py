"""Names the rank that ended, where a rank only notices that a connection broke."""

import time
from contextlib import suppress

import torch.distributed as dist

from pipeline.distributed import Ranks
from pipeline.rank_errors import RankUnreachable, reported_on_all_ranks
from pipeline.train.engine.rendezvous import Members, has_ended

SECONDS = 3.0
"""How long to search for the rank: a process that has closed its connections may take a moment to end."""
POLL_SECONDS = 0.1
ENDED = "ended"
"""Key of the ranks that ended, as the first rank wrote it that found them."""
WHERE = (
    "its last messages show why (under SLURM in RUN/logs); if it has none, it was killed, for lack of memory or by "
    "someone (dmesg). The same command (without --resume_from) resumes from the newest checkpoint."
)


def explain_lost_rank(error: BaseException, ranks: Ranks, members: Members) -> RankUnreachable | None:
    """One sentence for an error of a connection to another rank; None for other errors.

    Several ranks find the same: the lowest that is alive prints it.
    """
    of_gloo = isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    if ranks.count == 1 or not (of_gloo or isinstance(error, dist.DistError)):
        return None
    ended = find_ended(members)
    if not ended:
        reason = str(error).partition("\n")[0].rstrip(". ")
        return RankUnreachable(f"another rank has ended or can't be reached ({reason}): {WHERE}") if of_gloo else None
    names = f"rank {ended[0]} has" if len(ended) == 1 else f"ranks {', '.join(map(str, ended))} have"
    lost = RankUnreachable(f"{names} ended, and all others with it: {WHERE}")
    return lost if ranks.rank == min(set(range(ranks.count)) - set(ended)) else reported_on_all_ranks(lost)


def find_ended(members: Members) -> list[int]:
    """The ranks that ended first. Each rank searches its own machine, and reads what another has found."""
    end = time.monotonic() + SECONDS
    while True:
        found = [rank for rank, process in enumerate(members.processes) if has_ended(process)]
        with suppress(RuntimeError):  # the store ended with rank 0
            if found:
                written = members.store.compare_set(ENDED, "", " ".join(map(str, found)))
                return [int(rank) for rank in written.split()]
            if members.store.check([ENDED]):
                return [int(rank) for rank in members.store.get(ENDED).split()]
        if found or time.monotonic() > end:
            return found
        time.sleep(POLL_SECONDS)
