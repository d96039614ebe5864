"""Mirrored and shifted images, made on the token grid as batches are read; colors move with their pixels."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Changes:
    """What is done to some images, drawn by seed and position."""

    mirrored: np.ndarray
    """bool (B,): turned left to right, after the crop."""
    corners: np.ndarray
    """int16 (B, 2): row and column of the padded image at which the crop begins."""

    def __getitem__(self, which: slice) -> "Changes":
        return Changes(self.mirrored[which], self.corners[which])

    @classmethod
    def join(cls, parts: list["Changes"]) -> "Changes":
        """One after the other."""
        return cls(np.concatenate([part.mirrored for part in parts]), np.concatenate([part.corners for part in parts]))


@dataclass(frozen=True)
class Augmentation:
    """How images may be changed: `data.flip` and `data.reflect_crop`."""

    flip: bool = False
    """Mirror half of the images."""
    reflect_crop: int = 0
    """Pixels by which an image is padded on each side with its reflection, before a random crop of its own size."""

    def draw(self, draw: np.random.Generator, count: int) -> Changes:
        """Changes of `count` images. Flips are drawn first, so that crops leave them as they would be without."""
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
        """For a digest; what is not drawn leaves it as it was before there was such a choice."""
        return changes.mirrored.tobytes() + (changes.corners.tobytes() if self.reflect_crop else b"")


def mirror(tokens: np.ndarray, chosen: np.ndarray, resolution: int) -> np.ndarray:
    """Flips the chosen images left to right: uint16 (B, T), bool (B,) to uint16 (B, T)."""
    if not chosen.any():
        return tokens
    grid = tokens.reshape(len(tokens), resolution, resolution)  # (B, H, W)
    return np.where(chosen[:, None, None], grid[:, :, ::-1], grid).reshape(tokens.shape)


def _crop(tokens: np.ndarray, changes: Changes, padding: int, resolution: int) -> np.ndarray:
    """Crops of the padded images, and the mirror, in one gather: no padded image is ever made."""
    reflected = np.pad(np.arange(resolution), padding, mode="reflect")  # a padded image's row or column is which?
    side = np.arange(resolution)
    rows = reflected[changes.corners[:, :1] + side]  # (B, H)
    columns = reflected[changes.corners[:, 1:] + side]  # (B, W)
    columns = np.where(changes.mirrored[:, None], columns[:, ::-1], columns)
    first = np.arange(len(tokens))[:, None] * resolution**2 + rows * resolution  # (B, H): a row's place in `tokens`
    places = first[:, :, None] + columns[:, None, :]  # (B, H, W)
    return tokens.reshape(-1).take(places.reshape(tokens.shape), mode="clip")  # all are inside; clip skips the check
