"""Exact sums over a model's state that do not depend on how ranks share it: what a load is verified by.

The checksum of the weights, and of each moment, is the sum, modulo 2^64, of the bits of all elements, each times a
number made of its place in its parameter, each parameter's times one made of its name. Ranks add up what they hold,
whatever that is; an element that is changed, lost or misplaced shows.
"""

import hashlib
from math import prod
from typing import Any

import numpy as np
import torch

from pipeline.checkpoint.fragments import STATES, Fragment, Tensors

PIECE = 1 << 18
"""Elements at a time: what stays in a processor's cache."""
COUNT = np.arange(PIECE, dtype=np.uint64)
MODULUS = 1 << 64


def checksums(tensors: Tensors, index: list[dict[str, Any]]) -> dict[str, str]:
    """By state (weight, exp_avg, exp_avg_sq), of a snapshot on the host: 16 hexadecimal digits."""
    sums = dict.fromkeys(STATES, 0)
    for fragment in map(Fragment.from_entry, index):
        places, factor = _places(fragment), _factor(fragment.name)
        for state in STATES:
            sums[state] += factor * _weighted_sum(tensors[fragment.key(state)].numpy(), fragment.start, places)
    return {state: f"{value % MODULUS:016x}" for state, value in sums.items()}


def add_up(parts: list[dict[str, str]]) -> dict[str, str]:
    """The checksums of the whole, from those of what each rank holds."""
    return {state: f"{sum(int(part[state], 16) for part in parts) % MODULUS:016x}" for state in STATES}


def _factor(name: str) -> int:
    """Odd, so that no bit of a parameter's sum is lost."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) | 1


def _places(fragment: Fragment) -> np.ndarray | None:
    """Where the elements of a tensor-parallel part lie in the parameter, (length,); None if they lie end to end."""
    if fragment.part is None:
        return None
    whole = torch.arange(prod(fragment.shape)).view(fragment.shape)
    return fragment.part.of(whole).reshape(-1)[fragment.start : fragment.start + fragment.length].numpy()


def _weighted_sum(values: np.ndarray, start: int, places: np.ndarray | None) -> int:
    """The sum of bits * (2 * place + 1) of fp32 (n,), which lie end to end from `start` on, or at `places`."""
    bits, total = values.view(np.uint32), 0
    for first in range(0, len(bits), PIECE):
        piece = bits[first : first + PIECE].astype(np.uint64)
        base = start + first if places is None else 0
        within = COUNT[: len(piece)] if places is None else places[first : first + PIECE].astype(np.uint64)
        total += int(piece.sum()) * (2 * base + 1) + 2 * int(np.dot(piece, within))  # the product wraps around, rightly
    return total
