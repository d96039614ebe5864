"""Augmentation: flips and crops of images on the token grid, applied as batches are read."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Changes:
    """The augmentations of some images, drawn by seed and position."""

    mirrored: np.ndarray
    """bool (B,): flipped left to right, after the crop."""
    corners: np.ndarray
    """int16 (B, 2): row and column of the padded image at which the crop starts."""

    def __getitem__(self, which: slice | np.ndarray) -> "Changes":
        return Changes(self.mirrored[which], self.corners[which])

    @classmethod
    def join(cls, parts: list["Changes"]) -> "Changes":
        """Concatenates them."""
        return cls(np.concatenate([part.mirrored for part in parts]), np.concatenate([part.corners for part in parts]))


@dataclass(frozen=True)
class Augmentation:
    """The options of augmentation: `data.flip` and `data.reflect_crop`."""

    flip: bool = False
    """Flip half of the images."""
    reflect_crop: int = 0
    """Pixels of reflection padding on each side before a random crop to the image's size."""

    def draw(self, draw: np.random.Generator, count: int) -> Changes:
        """Draws the augmentations of `count` images. Flips are drawn first, so that crops do not change them."""
        mirrored, corners = np.zeros(count, bool), np.zeros((count, 2), np.int16)
        if self.flip:
            mirrored = draw.random(count) < 0.5
        if self.reflect_crop:
            corners = draw.integers(0, 2 * self.reflect_crop + 1, (count, 2), np.int16)
        return Changes(mirrored, corners)

    def apply(self, tokens: np.ndarray, changes: Changes, resolution: int) -> np.ndarray:
        """uint16 (B, T) in raster order to uint16 (B, T)."""
        if self.reflect_crop:
            return _crop(tokens, changes, self.reflect_crop, resolution)
        return mirror(tokens, changes.mirrored, resolution) if self.flip else tokens

    def bytes_of(self, changes: Changes) -> bytes:
        """Bytes for a digest; without crops they are the same as before crops were an option."""
        return changes.mirrored.tobytes() + (changes.corners.tobytes() if self.reflect_crop else b"")


def mirror(tokens: np.ndarray, chosen: np.ndarray, resolution: int) -> np.ndarray:
    """Flips the chosen images left to right: uint16 (B, T), bool (B,) to uint16 (B, T)."""
    if not chosen.any():
        return tokens
    grid = tokens.reshape(len(tokens), resolution, resolution)  # (B, H, W)
    return np.where(chosen[:, None, None], grid[:, :, ::-1], grid).reshape(tokens.shape)


def _crop(tokens: np.ndarray, changes: Changes, padding: int, resolution: int) -> np.ndarray:
    """Crops and flips in one gather, without creating the padded images."""
    reflected = np.pad(np.arange(resolution), padding, mode="reflect")  # the image row or column of each padded one
    side = np.arange(resolution)
    rows = reflected[changes.corners[:, :1] + side]  # (B, H)
    columns = reflected[changes.corners[:, 1:] + side]  # (B, W)
    columns = np.where(changes.mirrored[:, None], columns[:, ::-1], columns)
    first = np.arange(len(tokens))[:, None] * resolution**2 + rows * resolution  # (B, H): each row's index in `tokens`
    indices = first[:, :, None] + columns[:, None, :]  # (B, H, W)
    return tokens.reshape(-1).take(indices.reshape(tokens.shape), mode="clip")  # all are in range; clip skips the check
