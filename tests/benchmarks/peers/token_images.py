"""Random images as tokens, each of which carries its number: what is read can be told image by image."""

from pathlib import Path

import numpy as np

COLORS = 512
DIGITS = 3
"""Tokens at the beginning of an image that are its number, in base COLORS."""


def token_images(count: int, positions: int, first: int = 0) -> np.ndarray:
    """uint16 (count, positions), numbered from `first` on."""
    tokens = np.random.default_rng(first).integers(0, COLORS, (count, positions), np.uint16)
    for digit in range(DIGITS):
        tokens[:, digit] = np.arange(first, first + count) // COLORS**digit % COLORS
    return tokens


def numbers_of(batch: np.ndarray) -> np.ndarray:
    """int64 (n,): the numbers of the images of a batch (n, positions)."""
    return batch[:, :DIGITS].astype(np.int64) @ (COLORS ** np.arange(DIGITS))


def load(file: str | Path) -> np.ndarray:
    """The images of a .npy, in memory."""
    return np.load(file)
