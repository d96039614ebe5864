"""The validation loss on fixed held-out images, computed by all ranks together."""

from collections.abc import Callable

import numpy as np
import torch

from pipeline.checkpoint.probe import PROBE_TOKENS, HeldOutImages, probe_batch
from pipeline.config import TrainConfig
from pipeline.distributed import Ranks, mean_over_ranks
from pipeline.train.engine.base import Engine

CHUNK_MICRO_BATCHES = 8
"""Micro-batches per pipeline stage between two checks for a request to stop."""


def spread(available: int, wanted: int) -> np.ndarray:
    """Indices of `wanted` images (or all) spread evenly over a split: int64 (n,)."""
    count = min(available, wanted)
    return np.arange(count, dtype=np.int64) * available // count


def validation_loss(
    engine: Engine, held_out: HeldOutImages, config: TrainConfig, ranks: Ranks, check: Callable[[], None]
) -> float:
    """Mean nats per token over validation.images images of the split; the same on all ranks.

    check: called on all ranks before each chunk of CHUNK_MICRO_BATCHES x stages micro-batches; what it raises ends the
    validation.

    All ranks must run equally many forward passes, because ZeRO-3 gathers weights in each. So a rank with fewer images
    repeats its last one, and excludes the repetition from the sum.
    """
    chosen = spread(held_out.images, config.validation.images)
    own = np.array_split(chosen, engine.data_ranks)[engine.data_rank]
    share = -(-len(chosen) // engine.data_ranks)
    padded = np.concatenate([own, np.full(share - len(own), chosen[-1])])
    chunk = CHUNK_MICRO_BATCHES * config.parallel.pipeline_stages * config.batch.micro_size
    nats = []
    for start in range(0, share, chunk):
        check()
        nats.append(engine.evaluate(held_out.batch(padded[start : start + chunk])))
    # All stages of a data-parallel rank hold the same sum, so the mean over all ranks is the mean over data ranks.
    total = torch.tensor([np.concatenate(nats)[: len(own)].sum()], dtype=torch.float64, device=ranks.device)
    return float(mean_over_ranks(total).item() * engine.data_ranks / len(chosen))


def probe_loss(engine: Engine, held_out: HeldOutImages, tokens: int | None = PROBE_TOKENS) -> float:
    """Nats per token of the probe batch: the same on every rank and topology."""
    return float(engine.evaluate(probe_batch(held_out, tokens)).mean())
