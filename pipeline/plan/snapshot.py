"""The host memory that a rank keeps for its snapshots, the copies of its fragments of weights, moments and average."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from pipeline.config import TrainConfig

if TYPE_CHECKING:
    from transformers import GPT2Config

STATES = 3
"""The fp32 weight and two moments of each fragment, a tensor each; the weight's moving average is one more."""


def snapshot_bytes(config: TrainConfig, model: GPT2Config, ranks: int, pinned: bool) -> float:
    """Bytes of a rank's snapshot on the host, mean over ranks.

    pinned: as it is copied from an accelerator. torch's allocator of pinned memory rounds each tensor up to a power of
    two (CachingHostAllocatorImpl::allocate): 1.1 times as much for S and M, 1.5 to 1.65 times for L and XL.
    """
    parallel = config.parallel
    parts = ranks // parallel.tensor_parallel
    matrices, others = _sizes(model, parallel.tensor_parallel)
    cut = _cut_each if parallel.zero_stage in (0, 3) else _cut_together
    lengths = [*cut(matrices, parts), *cut(others, parts)]
    states = STATES + (1 if config.ema.decay else 0)
    return sum(states * (_power_of_two(4 * length) if pinned else 4 * length) for length in lengths) / parts


def _sizes(model: GPT2Config, tensor: int) -> tuple[list[int], list[int]]:
    """Elements of each parameter of a rank, in the two groups of the optimizer: with and without weight decay."""
    width, inner = model.n_embd, model.n_inner or 4 * model.n_embd
    block = [3 * width**2 // tensor, width**2 // tensor, width * inner // tensor, width * inner // tensor]
    head = [width * model.colors] if model.block == "igpt" else []
    return block * model.n_layer + head, [model.vocab_size * width, model.n_positions * width] + [width] * (
        2 * model.n_layer + 1
    )


def _cut_together(sizes: Sequence[int], parts: int) -> Iterator[int]:
    """ZeRO-1 and 2: lengths of the fragments if the concatenated parameters are cut into equal parts."""
    ends = list(accumulate(sizes))
    borders = {ends[-1] * part // parts for part in range(parts)}
    for start, end in pairwise(sorted({0, *ends} | borders)):
        yield end - start


def _cut_each(sizes: Sequence[int], parts: int) -> Iterator[int]:
    """ZeRO-3: if each parameter is cut into equal parts; so does a snapshot of ZeRO-0."""
    for size in sizes:
        yield from (size * (part + 1) // parts - size * part // parts for part in range(parts))


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length() if size else 0
