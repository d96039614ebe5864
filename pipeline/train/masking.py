"""Which colours the masked objective hides: a pure function of (seed, place), whatever the ranks and restarts."""

import numpy as np

from data_prep.seeding import generator
from data_prep.shards import Split
from pipeline.model.objectives import hide
from pipeline.train.batches import Batches


class Masks:
    """Each colour of a picture is hidden with the same probability, independently (the paper's section 2.2)."""

    def __init__(self, seed: int, probability: float) -> None:
        self._seed, self._probability = seed, probability

    def hide(self, tokens: np.ndarray, part: str, places: np.ndarray) -> np.ndarray:
        """Pictures uint16 (B, T) with hidden colours; places int64 (B,): each picture's number in its `part`.

        A picture of which nothing would be hidden loses the colour that came nearest to it.
        """
        draws = np.stack([generator(self._seed, "mask", part, int(place)).random(tokens.shape[1]) for place in places])
        threshold = np.maximum(draws.min(axis=1, keepdims=True), np.nextafter(self._probability, 0))
        return hide(tokens, draws <= threshold)


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


class MaskedSplit:
    """Held-out pictures whose colours are hidden by their number in the split: the same ones at each validation."""

    def __init__(self, split: Split, masks: Masks) -> None:
        self.images = split.images
        self._split, self._masks = split, masks

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `Split.gather`."""
        tokens, labels = self._split.gather(indices)
        return self._masks.hide(tokens, "valid", indices), labels
