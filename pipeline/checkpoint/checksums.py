"""Checksums over a model's state that do not depend on the topology; every load is verified with them.

The checksum of the weights, of each moment, and of the weights' moving average if there is one, is a sum modulo 2^64
over all elements. Each element's bits are multiplied by a number derived from its position in the parameter, and each
parameter's sum by a number derived from its name. The ranks' sums add up to the checksum for any partitioning. A
changed, lost or misplaced element changes it.
"""

import hashlib
from math import prod
from typing import Any

import numpy as np
import torch

from pipeline.checkpoint.fragments import EMA, STATES, Fragment, Tensors

CHUNK = 1 << 18
"""Elements processed at a time, to stay in the processor's cache."""
INDICES = np.arange(CHUNK, dtype=np.uint64)
MODULUS = 1 << 64


def checksums(tensors: Tensors, index: list[dict[str, Any]]) -> dict[str, str]:
    """Checksums of a snapshot on the host, by state (weight, exp_avg, exp_avg_sq, ema): 16 hexadecimal digits."""
    sums = dict.fromkeys(STATES, 0)
    for fragment in map(Fragment.from_entry, index):
        positions, factor = _positions(fragment), _factor(fragment.name)
        for state in (*STATES, EMA) if fragment.key(EMA) in tensors else STATES:
            added = factor * _weighted_sum(tensors[fragment.key(state)].numpy(), fragment.start, positions)
            sums[state] = sums.get(state, 0) + added
    return {state: f"{value % MODULUS:016x}" for state, value in sums.items()}


def add_up(parts: list[dict[str, str]]) -> dict[str, str]:
    """The checksums of the complete state, from those of each rank; one that holds no fragment has no average."""
    states = [state for state in (*STATES, EMA) if any(state in part for part in parts)]
    return {state: f"{sum(int(part.get(state, '0'), 16) for part in parts) % MODULUS:016x}" for state in states}


def _factor(name: str) -> int:
    """A factor for each parameter; odd, so that no bit of the parameter's sum is lost."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) | 1


def _positions(fragment: Fragment) -> np.ndarray | None:
    """Positions of a tensor-parallel part's elements in the parameter, (length,); None if they are contiguous."""
    if fragment.part is None:
        return None
    parameter = torch.arange(prod(fragment.shape)).view(fragment.shape)
    return fragment.part.of(parameter).reshape(-1)[fragment.start : fragment.start + fragment.length].numpy()


def _weighted_sum(values: np.ndarray, start: int, positions: np.ndarray | None) -> int:
    """The sum of bits * (2 * position + 1) of fp32 (n,), at contiguous positions from `start`, or at `positions`."""
    bits, total = values.view(np.uint32), 0
    for first in range(0, len(bits), CHUNK):
        chunk = bits[first : first + CHUNK].astype(np.uint64)
        base = start + first if positions is None else 0
        within = INDICES[: len(chunk)] if positions is None else positions[first : first + CHUNK].astype(np.uint64)
        total += int(chunk.sum()) * (2 * base + 1) + 2 * int(np.dot(chunk, within))  # wraps around, as intended
    return total
