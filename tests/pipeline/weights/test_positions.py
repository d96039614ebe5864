"""Position embeddings of another resolution against scipy's spline interpolation."""

import numpy as np
import pytest
import torch
from scipy.ndimage import zoom

from pipeline.weights.positions import resampled_positions


@pytest.mark.parametrize(("old", "new"), [(8, 12), (16, 32), (32, 48), (48, 64), (64, 32), (32, 32)])
@pytest.mark.parametrize("has_sos", [False, True])
def test_the_grid_is_that_of_scipy(old: int, new: int, has_sos: bool) -> None:
    grid = np.random.default_rng(0).normal(size=(old, old, 3)).astype(np.float32)
    positions = torch.from_numpy(grid.reshape(old * old, 3))
    found = resampled_positions(positions, new, has_sos=has_sos)
    channels = np.moveaxis(grid.astype(np.float64), -1, 0)
    zoomed = [zoom(channel, new / old, order=3, mode="reflect", grid_mode=True) for channel in channels]
    expected = np.stack(zoomed, axis=-1)
    assert (found.dtype, found.shape) == (torch.float32, (new * new, 3))
    first = int(has_sos)
    np.testing.assert_allclose(found[first:], expected.reshape(new * new, 3)[first:], atol=1e-6, rtol=0)
    if has_sos:
        assert torch.equal(found[0], positions[0]), "SOS keeps its position"
    if old == new:
        np.testing.assert_allclose(found, positions, atol=1e-6, rtol=0)


def test_a_constant_stays_constant() -> None:
    constant = torch.full((256, 2), 0.7)
    torch.testing.assert_close(resampled_positions(constant, 40, has_sos=True), torch.full((1600, 2), 0.7))
