"""Which pixels the masked objective masks: a pure function of (seed, image), whatever the ranks and restarts."""

from dataclasses import dataclass

import numpy as np

from data_prep.common.seeding import generator


@dataclass(frozen=True)
class Batch:
    """Images as a model reads them."""

    tokens: np.ndarray
    """Palette indices, uint16 (B, T)."""
    masked: np.ndarray | None = None
    """bool (B, T): the pixels to be predicted from all others; None where each is predicted from those before it."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, which: slice | np.ndarray) -> "Batch":
        """Some of the images."""
        return Batch(self.tokens[which], None if self.masked is None else self.masked[which])

    def beginning(self, positions: int | None) -> "Batch":
        """The first positions of each image; all if None."""
        masked = None if self.masked is None else self.masked[:, :positions]
        return Batch(self.tokens[:, :positions], masked)


class Masks:
    """Each pixel of an image is masked with the same probability, independently (the paper's section 2.2)."""

    def __init__(self, seed: int, probability: float) -> None:
        self._seed, self._probability = seed, probability

    def draw(self, part: str, numbers: np.ndarray, positions: int) -> np.ndarray:
        """bool (B, positions) of the images with these numbers, int64 (B,), in their `part`: True where masked.

        In an image of which nothing would be masked, the pixel that came nearest to it is.
        """
        draws = np.stack([generator(self._seed, "mask", part, int(number)).random(positions) for number in numbers])
        threshold = np.maximum(draws.min(axis=1, keepdims=True), np.nextafter(self._probability, 0))
        return draws <= threshold
