"""Draws completions as in the paper: one row for each image, with the given half, the samples and the original."""

import numpy as np

from data_prep.palette.codec import decode

CELL_PIXELS = 96
GAP_PIXELS = 4
UNSEEN = 200
"""Gray level of the pixels that the model completes."""
BACKGROUND = 255


def completion_grid(originals: np.ndarray, completed: np.ndarray, palette: np.ndarray, resolution: int) -> np.ndarray:
    """Draws a grid, uint8 (height, width, 3).

    originals: uint16 (B, T); completed: uint16 (B, samples, T), whose first T / 2 tokens were given;
    palette: float32 (V, 3) in [-1, 1].
    """
    original = decode(originals, palette, resolution)  # (B, H, W, 3)
    given = original.copy()
    given[:, resolution // 2 :] = UNSEEN
    samples = decode(completed, palette, resolution)  # (B, samples, H, W, 3)
    columns = [given, *np.moveaxis(samples, 1, 0), original]
    rows = [_join([column[row] for column in columns], resolution) for row in range(len(originals))]
    return np.pad(np.concatenate(rows), ((GAP_PIXELS, 0), (0, GAP_PIXELS), (0, 0)), constant_values=BACKGROUND)


def _join(images: list[np.ndarray], resolution: int) -> np.ndarray:
    """Enlarges images without smoothing, and concatenates them horizontally."""
    scale = max(1, CELL_PIXELS // resolution)
    cells = [image.repeat(scale, axis=0).repeat(scale, axis=1) for image in images]
    gap = ((0, GAP_PIXELS), (GAP_PIXELS, 0), (0, 0))
    return np.concatenate([np.pad(cell, gap, constant_values=BACKGROUND) for cell in cells], axis=1)
