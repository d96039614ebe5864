"""Batches with masked pixels, for the masked objective."""

from dataclasses import replace

import numpy as np

from pipeline.model.masks import Batch, Masks
from pipeline.train.data.batches import Batches


class MaskedBatches:
    """A data-parallel rank's share of each batch with masked pixels; masks are a function of (seed, position)."""

    def __init__(self, batches: Batches, masks: Masks, rank: int, interleaved_ranks: int | None = None) -> None:
        """interleaved_ranks: data-parallel ranks, if each has every ranks-th image; None if it has consecutive ones."""
        self._batches, self._masks, self._rank, self._ranks = batches, masks, rank, interleaved_ranks

    def at(self, position: int, global_size: int) -> Batch:
        """As `Batches.at`."""
        batch = self._batches.at(position, global_size)
        own = np.arange(len(batch)) + self._rank * len(batch)
        if self._ranks is not None:
            own = np.arange(len(batch)) * self._ranks + self._rank
        masked = self._masks.draw("train", position + own, batch.tokens.shape[1])
        return replace(batch, masked=masked)

    def close(self) -> None:
        """As `Batches.close`."""
        self._batches.close()
