"""Position embeddings of another resolution: resampled on the grid of the image."""

from math import isqrt

import numpy as np
import torch

from pipeline.checkpoint.fragments import Fragment, StateReader

POSITIONS = "transformer.wpe.weight"


def resampled_positions(positions: torch.Tensor, resolution: int, *, has_sos: bool) -> torch.Tensor:
    """Position embeddings fp32 (T, D) of a square image, for one of `resolution` x `resolution`: fp32 (T', D).

    Bicubic: on the grid (side, side, D), rows and columns are interpolated by cubic splines with the image's edges
    mirrored and the pixels' centers aligned, in fp64, as `scipy.ndimage.zoom(grid, ratio, order=3, mode="reflect",
    grid_mode=True)` does. A spline goes through its points, so an unchanged resolution changes nothing.

    has_sos: the first position is that of SOS. It is the grid's corner, since position t predicts pixel t, but it is
    only ever added to SOS; so it is kept as it is.
    """
    side = isqrt(len(positions))
    matrix = torch.from_numpy(spline_matrix(side, resolution))
    grid = positions.double().view(side, side, -1)
    resampled = torch.einsum("ai,bj,ijd->abd", matrix, matrix, grid).reshape(resolution**2, -1).float()
    if has_sos:
        resampled[0] = positions[0]
    return resampled


def spline_matrix(old: int, new: int) -> np.ndarray:
    """The matrix (new, old) that maps values on a line to a cubic spline's values at the new pixels' centers."""
    coefficients = np.linalg.inv(_basis(old, np.arange(old, dtype=np.float64)))  # of the B-splines, from the values
    return _basis(old, (np.arange(new) + 0.5) * old / new - 0.5) @ coefficients


def _basis(count: int, at: np.ndarray) -> np.ndarray:
    """Cubic B-splines centered at 0 .. count - 1, mirrored about -1/2 and count - 1/2, at these points: (n, count)."""
    values = np.zeros((len(at), count))
    first = np.floor(at).astype(int) - 1
    for number in (first, first + 1, first + 2, first + 3):
        distance = np.abs(at - number)
        value = np.where(distance < 1, 2 / 3 - distance**2 + distance**3 / 2, np.maximum(2 - distance, 0) ** 3 / 6)
        mirrored = number % (2 * count)
        np.add.at(values, (np.arange(len(at)), np.minimum(mirrored, 2 * count - 1 - mirrored)), value)
    return values


class ResampledPositions:
    """A reader whose position embeddings are those of another resolution; it has no moments."""

    optimizer_step = 0.0
    has_average = False

    def __init__(self, reader: StateReader, resolution: int, *, has_sos: bool) -> None:
        self._reader = reader
        self._positions = resampled_positions(reader.read(POSITIONS), resolution, has_sos=has_sos)
        self.shapes = reader.shapes | {POSITIONS: tuple(self._positions.shape)}

    def read(self, name: str, state: str = "weight") -> torch.Tensor:
        """A complete parameter: fp32, in its shape."""
        return self._positions if name == POSITIONS else self._reader.read(name, state)

    def fill(self, target: torch.Tensor, wanted: Fragment, state: str) -> None:
        """Reads the elements of `wanted` into `target`, (wanted.length,)."""
        if wanted.name == POSITIONS:
            target.copy_(wanted.of(self._positions))
        else:
            self._reader.fill(target, wanted, state)
