"""The probe batch: tokens of a held-out image, whose loss every checkpoint stores and every load compares."""

import numpy as np

from data_prep.shards.reader import Split
from pipeline.model.masks import Batch, Masks

PROBE_TOKENS = 64
"""Of one image: every save waits for their forward pass. They show whether the weights that it reads are well; that
each single element is as it was saved, the checksums show."""


class HeldOutImages:
    """Held-out images as the engine reads them; with `masks` the same pixels of each are masked at each validation."""

    def __init__(self, split: Split, masks: Masks | None = None) -> None:
        self.images = split.images
        self._split, self._masks = split, masks

    def batch(self, numbers: np.ndarray) -> Batch:
        """Images by their number in the split, int64 (B,)."""
        tokens, _ = self._split.gather(numbers)
        if self._masks is None:
            return Batch(tokens)
        return Batch(tokens, self._masks.draw("valid", numbers, tokens.shape[1]))


def probe_batch(held_out: HeldOutImages, tokens: int | None = PROBE_TOKENS) -> Batch:
    """The beginning of a fixed held-out image, (1, tokens); all of it if `tokens` is None, and where nothing of the
    beginning is masked under the masked objective."""
    image = held_out.batch(np.zeros(1, np.int64))
    beginning = image.beginning(tokens)
    return image if beginning.masked is not None and not beginning.masked.any() else beginning
