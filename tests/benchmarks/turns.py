"""Measuring in turns: ours and the peer's one after the other, so that a busy machine slows both.

On CPU a second is one of the process's CPU time, which other work on the machine lengthens little.
"""

import time
from collections.abc import Callable

import torch

TURNS = 5


def best(work: float, *candidates: Callable[[], object], turns: int = TURNS) -> list[float]:
    """Work a second of each candidate: the best of some turns, taken alternately after one to warm up."""
    seconds: list[list[float]] = [[] for _ in candidates]
    for turn in range(turns + 1):
        for times, candidate in zip(seconds, candidates, strict=True):
            start = _now()
            candidate()
            if turn:
                times.append(_now() - start)
    return [work / min(times) for times in seconds]


def _now() -> float:
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()
