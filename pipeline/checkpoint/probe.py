"""The probe batch: tokens of a held-out image, whose loss every checkpoint stores and every load compares."""

from typing import Protocol

import numpy as np

from data_prep.shards.reader import Split
from pipeline.model.masks import Masks
from pipeline.model.objectives import is_hidden


class MaskedSplit:
    """Held-out pictures whose colours are hidden by their number in the split: the same ones at each validation."""

    def __init__(self, split: Split, masks: Masks) -> None:
        self.images = split.images
        self._split, self._masks = split, masks

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `Split.gather`."""
        tokens, labels = self._split.gather(indices)
        return self._masks.hide(tokens, "valid", indices), labels


class Pictures(Protocol):
    """Held-out pictures as the engine reads them."""

    @property
    def images(self) -> int:
        """How many there are."""
        ...

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pictures by number: uint16 (k, T), and their labels."""
        ...


PROBE_TOKENS = 64
"""Of one picture: every save waits for their forward pass. They show whether the weights that it reads are well; that
each single element is as it was saved, the fingerprints show."""


def probe_tokens(split: Pictures, tokens: int | None = PROBE_TOKENS) -> np.ndarray:
    """The probe batch, the beginning of a fixed held-out picture: uint16 (1, T); all of it if `tokens` is None, and
    where nothing of the beginning is hidden under the masked objective."""
    picture = split.gather(np.zeros(1, np.int64))[0]
    beginning = picture[:, :tokens]
    return picture if is_hidden(picture).any() and not is_hidden(beginning).any() else beginning
