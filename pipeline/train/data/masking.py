"""Batches and held-out pictures with colours hidden, for the masked objective."""

import numpy as np

from pipeline.model.masks import Masks
from pipeline.train.data.batches import Batches


class MaskedBatches:
    """A data-parallel rank's share of each batch, with colours hidden by the position in the data order."""

    def __init__(self, batches: Batches, masks: Masks, rank: int) -> None:
        self._batches, self._masks, self._rank = batches, masks, rank

    def at(self, position: int, global_size: int) -> np.ndarray:
        """As `Batches.at`."""
        tokens = self._batches.at(position, global_size)
        first = position + self._rank * len(tokens)
        return self._masks.hide(tokens, "train", np.arange(first, first + len(tokens)))

    def close(self) -> None:
        """As `Batches.close`."""
        self._batches.close()
