"""The check image: tokens of a held-out image. Every checkpoint stores its loss, and every load compares it."""

from typing import Any

import numpy as np

from data_prep.shards.reader import Split
from pipeline.model.masks import Batch, Masks

PROBE_TOKENS = 16
"""Tokens of the check image; few, because every save waits for their forward pass. The probe loss verifies the weights
that the forward pass reads; the checksums verify every single element."""


class HeldOutImages:
    """Batches of held-out images; with `masks`, the same pixels of an image are masked at each validation."""

    def __init__(self, split: Split, masks: Masks | None = None) -> None:
        self.images = split.images
        self._split, self._masks = split, masks

    def batch(self, numbers: np.ndarray) -> Batch:
        """The images with these indices in the split, int64 (B,)."""
        tokens, _ = self._split.gather(numbers)
        if self._masks is None:
            return Batch(tokens)
        return Batch(tokens, self._masks.draw("valid", numbers, tokens.shape[1]))


def as_json(probe: Batch) -> dict[str, Any]:
    """A check image for checkpoint.json: its tokens, and its masked pixels or None."""
    return {"tokens": probe.tokens.tolist(), "masked": None if probe.masked is None else probe.masked.tolist()}


def from_json(stored: dict[str, Any]) -> Batch:
    """The batch that `as_json` describes."""
    masked = stored["masked"]
    return Batch(np.array(stored["tokens"], np.uint16), None if masked is None else np.array(masked, bool))


def probe_batch(held_out: HeldOutImages, tokens: int | None = PROBE_TOKENS) -> Batch:
    """The first `tokens` of a fixed held-out image, (1, tokens).

    The complete image if `tokens` is None, or if the masked objective masks none of these tokens.
    """
    image = held_out.batch(np.zeros(1, np.int64))
    prefix = image.prefix(tokens)
    return image if prefix.masked is not None and not prefix.masked.any() else prefix
