"""The validation loss on fixed held-out images, computed by all ranks together."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pipeline.checkpoint.probe import HeldOutImages
from pipeline.config import TrainConfig
from pipeline.distributed import Ranks, mean_over_ranks
from pipeline.model.masks import Batch
from pipeline.train.engine.base import Engine
from pipeline.train.setup import Inputs

CHUNK_MICRO_BATCHES = 8
"""Micro-batches per pipeline stage between two checks for a request to stop."""


def spread(available: int, wanted: int) -> np.ndarray:
    """Indices of `wanted` images (or all) spread evenly over a split: int64 (n,)."""
    count = min(available, wanted)
    return np.arange(count, dtype=np.int64) * available // count


def validation_losses(engine: Engine, inputs: Inputs, check: Callable[[], None]) -> dict[str, Any]:
    """valid_loss, the mean of the sets' losses with the mixture's weights, and valid_loss_by_set for a mixture.

    Each set's loss is that of validation.images of its own images, as if it were the run's only set. check: as for
    validation_loss.
    """
    sets, config, ranks = inputs.sets, inputs.config, inputs.ranks
    losses = [validation_loss(engine, held_out, config, ranks, check) for held_out in inputs.held_out]
    mean = sum(one.weight * loss for one, loss in zip(sets.sets, losses, strict=True))
    by_set = {one.name: loss for one, loss in zip(sets.sets, losses, strict=True)}
    return {"valid_loss": mean} | ({"valid_loss_by_set": by_set} if sets.is_mixture else {})


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


def probe_loss(engine: Engine, probe: Batch) -> float:
    """Nats per token of the check image: the same on every rank and topology."""
    return float(engine.evaluate(probe).mean())
