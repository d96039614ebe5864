"""The masked pixels of the masked objective: a pure function of (seed, image), independent of ranks and restarts."""

from dataclasses import dataclass

import numpy as np

from data_prep.common.seeding import generator


@dataclass(frozen=True)
class Batch:
    """Images, and the pixels that are masked."""

    tokens: np.ndarray
    """Palette indices, uint16 (B, T)."""
    masked: np.ndarray | None = None
    """bool (B, T): pixels to predict from all others; None to predict each pixel from the pixels before it."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, which: slice | np.ndarray) -> "Batch":
        """Some of the images."""
        return Batch(self.tokens[which], None if self.masked is None else self.masked[which])

    def prefix(self, positions: int | None) -> "Batch":
        """The first positions of each image; all if None."""
        masked = None if self.masked is None else self.masked[:, :positions]
        return Batch(self.tokens[:, :positions], masked)


class Masks:
    """Draws masks: each pixel is masked independently with the same probability (the paper's section 2.2)."""

    def __init__(self, seed: int, probability: float) -> None:
        self._seed, self._probability = seed, probability

    def draw(self, part: str, numbers: np.ndarray, positions: int) -> np.ndarray:
        """bool (B, positions), True where masked, for the images with these numbers, int64 (B,).

        part: "train" or "valid", which have different masks. At least one pixel of each image is masked: the one with
        the smallest random number.
        """
        draws = np.stack([generator(self._seed, "mask", part, int(number)).random(positions) for number in numbers])
        threshold = np.maximum(draws.min(axis=1, keepdims=True), np.nextafter(self._probability, 0))
        return draws <= threshold
