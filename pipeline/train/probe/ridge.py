"""The ridge classifier of one layer, in closed form and float64.

It is scikit-learn's RidgeClassifier(class_weight="balanced"), with its intercept: the weighted squared error to one-hot
targets plus alpha times the squared weights, where an image of class c weighs N / (C N_c). scikit-learn's targets are
-1 and 1 instead of 0 and 1, which doubles all scores and shifts them equally: the largest is the same.

One eigendecomposition of the weighted Gram matrix solves it for every alpha. Here alpha is a strength times the mean
eigenvalue, so that the strengths mean the same for features of any scale.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

from pipeline.probe_config import STRENGTHS


class Rows(NamedTuple):
    """Features of one layer with their labels."""

    features: np.ndarray  # float32 (N, D)
    labels: np.ndarray  # int32 (N,)


class LayerScore(NamedTuple):
    """The accuracy of one layer's classifier."""

    choice: float
    """Of the best L2 strength, on the images that chose it."""
    test: float
    """Of the same classifier, on the other held-out images."""
    strength: float
    """The L2 strength that was chosen."""


NO_SCORE = LayerScore(float("nan"), float("nan"), float("nan"))
"""Of features that are NaN or Inf."""


class Ridge:
    """The classifiers of all L2 strengths, fitted to N images of C classes."""

    def __init__(self, train: Rows, device: torch.device) -> None:
        self._device = device
        features, labels = self._put(train.features), torch.from_numpy(train.labels).long().to(device)
        self._labels, classes = torch.unique(labels, return_inverse=True)  # (C,), (N,)
        counts = torch.bincount(classes).double()
        weights = (len(classes) / (len(counts) * counts))[classes]  # (N,), their sum is N
        self._mean = weights @ features / len(classes)  # (D,)
        centred = features.sub_(self._mean)  # in place: these are the largest tensors
        weighted = weights[:, None] * centred
        eigenvalues, self._vectors = torch.linalg.eigh(weighted.T @ centred)
        self._eigenvalues = eigenvalues.clamp(min=0)
        targets = functional.one_hot(classes, len(counts)).double()  # (N, C)
        self._targets = self._vectors.T @ (weighted.T @ targets)  # (D, C); the intercept is 1 / C for every class

    def predict(self, features: np.ndarray) -> np.ndarray:
        """The class of each of B images for each of STRENGTHS, int64 (S, B)."""
        projected = (self._put(features) - self._mean) @ self._vectors  # (B, D)
        scale = self._eigenvalues.mean().clamp(min=torch.finfo(torch.float64).tiny)
        found = []
        for strength in STRENGTHS:
            solution = self._targets / (self._eigenvalues + strength * scale)[:, None]  # (D, C)
            found.append(self._labels[(projected @ solution).argmax(dim=1)])
        return torch.stack(found).cpu().numpy()

    def _put(self, features: np.ndarray) -> torch.Tensor:
        """A copy in float64, on the device."""
        return torch.from_numpy(features).to(self._device).double()


def score_layer(train: Rows, choice: Rows, test: Rows, device: torch.device) -> LayerScore:
    """Fits the classifiers to train, chooses the L2 strength on choice (the strongest of equals), measures on test."""
    if not all(np.isfinite(part.features).all() for part in (train, choice, test)):
        return NO_SCORE
    ridge = Ridge(train, device)
    of_choice, of_test = (
        (ridge.predict(part.features) == part.labels).mean(axis=1) for part in (choice, test)
    )  # (S,) each
    best = int(of_choice.argmax())
    return LayerScore(float(of_choice[best]), float(of_test[best]), STRENGTHS[best])
