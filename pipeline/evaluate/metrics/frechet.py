"""The Fréchet distance between two sets of images, modeled as Gaussians in the feature space of a network.

    d^2 = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))

with means m and covariances C (Heusel et al. 2017, "GANs trained by a two time-scale update rule converge to a local
Nash equilibrium", which call d^2 the FID when the network is Inception). It depends on the number of images, so
compare it only between sets of the same size and under the same network.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Gaussian:
    """Mean float64 (F,) and covariance float64 (F, F) of features."""

    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "Gaussian":
        """The Gaussian of features (N, F), N at least 2; the covariance divides by N - 1."""
        assert len(features) > 1
        exact = features.astype(np.float64)
        return cls(exact.mean(axis=0), np.atleast_2d(np.cov(exact, rowvar=False)))


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """The squared distance d^2, never negative.

    tr (C1 C2)^(1/2) is the sum of the roots of the eigenvalues of R C2 R with R = C1^(1/2): symmetric, so the
    roots are real even if the covariances are singular, as with fewer images than features.
    """
    values, vectors = np.linalg.eigh(first.covariance)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T  # (F, F)
    between = np.linalg.eigvalsh(root @ second.covariance @ root)
    spread = np.trace(first.covariance) + np.trace(second.covariance) - 2 * np.sqrt(np.clip(between, 0, None)).sum()
    return float(max(0.0, np.sum((first.mean - second.mean) ** 2) + spread))
