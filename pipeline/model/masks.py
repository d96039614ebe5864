"""Which colours the masked objective hides: a pure function of (seed, place), whatever the ranks and restarts."""

import numpy as np

from data_prep.common.seeding import generator
from pipeline.model.objectives import hide


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
