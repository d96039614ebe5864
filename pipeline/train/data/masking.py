"""Batches with masked pixels, for the masked objective."""

from dataclasses import replace

import numpy as np

from pipeline.model.masks import Batch, Masks
from pipeline.train.data.batches import Batches


class MaskedBatches:
    """A data-parallel rank's share of each batch with masked pixels; masks are a function of (seed, position)."""

    def __init__(self, batches: Batches, masks: Masks, rank: int) -> None:
        self._batches, self._masks, self._rank = batches, masks, rank

    def at(self, position: int, global_size: int) -> Batch:
        """As `Batches.at`."""
        batch = self._batches.at(position, global_size)
        first = position + self._rank * len(batch)
        masked = self._masks.draw("train", np.arange(first, first + len(batch)), batch.tokens.shape[1])
        return replace(batch, masked=masked)

    def close(self) -> None:
        """As `Batches.close`."""
        self._batches.close()
