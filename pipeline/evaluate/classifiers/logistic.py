"""A linear classifier on standardized features, fitted by L-BFGS.

Multinomial logistic regression, as the paper fits on CIFAR and STL-10 (section 3.4; scikit-learn's solver,
`openai/image-gpt#12`). Features are standardized with the mean and the standard deviation of the training images.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from scipy.special import log_softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from pipeline.evaluate.features.labelled import Labelled, Rows, in_blocks

ITERATIONS = 1000
TOLERANCE = 1e-4
ROWS_AT_ONCE = 64
"""Rows that are standardized at once: few, so that their float64 copies stay in the processor's cache."""


@dataclass(frozen=True)
class LinearClassifier:
    """Log odds of the classes as a linear function of the standardized features."""

    mean: np.ndarray  # (D,)
    deviation: np.ndarray  # (D,)
    weight: np.ndarray  # (C, D)
    bias: np.ndarray  # (C,)
    classes: np.ndarray  # int (C,), ascending: the labels in the training set
    setting: float
    """The L2 strength or the learning rate that it was fitted with."""
    converged: bool
    """False if L-BFGS reached its iteration limit, or if SGD ended with NaN or Inf."""

    def predict(self, features: Rows) -> np.ndarray:
        """The most probable label of each image, int (N,)."""
        best = [self._scores(block).argmax(axis=1) for _, block in in_blocks(features)]
        return self.classes[np.concatenate([np.empty(0, np.int64), *best])]

    def accuracy(self, data: Labelled) -> float:
        """Fraction of the images whose label is predicted correctly."""
        return float((self.predict(data.features) == data.labels).mean())

    def losses(self, data: Labelled) -> np.ndarray:
        """-ln p of the label of each image, (n,); images of a class that the training set lacks are excluded."""
        known = np.isin(data.labels, self.classes)
        blocks = [log_softmax(self._scores(block), axis=1) for _, block in in_blocks(data.features)]
        log_probabilities = np.concatenate([np.empty((0, len(self.classes)), np.float32), *blocks])[known]  # (n, C)
        return -log_probabilities[np.arange(known.sum()), np.searchsorted(self.classes, data.labels[known])]

    @classmethod
    def of(cls, cached: dict[str, Any]) -> "LinearClassifier":
        """From a dict with the fields, as `asdict` returns them; other keys are ignored."""
        return cls(**{field.name: cached[field.name] for field in fields(cls)})

    def _scores(self, features: np.ndarray) -> np.ndarray:  # (n, D) -> (n, C)
        return standardised(features, self.mean, self.deviation) @ self.weight.T + self.bias


def standardised(features: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Features minus mean, divided by deviation: float32 (n, D)."""
    result = np.empty(features.shape, np.float32)
    for first in range(0, len(features), ROWS_AT_ONCE):
        some = slice(first, first + ROWS_AT_ONCE)
        result[some] = (features[some] - mean) / deviation
    return result


def moments(features: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each feature, float64 (D,); a constant feature has deviation 1."""
    scaler = StandardScaler()
    for _, block in in_blocks(features):
        scaler.partial_fit(block)
    return scaler.mean_, scaler.scale_


def logistic_path(train: Labelled, strengths: Sequence[float]) -> Iterator[LinearClassifier]:
    """A classifier for each L2 strength, from strong to weak; each fit starts from the previous solution.

    The objective with strength s is (mean loss) + s/2 * (sum of squared weights).
    """
    mean, deviation = moments(train.features)
    inputs = np.empty((len(train.labels), len(mean)), np.float32)  # (N, D)
    for rows, block in in_blocks(train.features):
        inputs[rows] = standardised(block, mean, deviation)
    solver = LogisticRegression(tol=TOLERANCE, max_iter=ITERATIONS, warm_start=True)
    for strength in sorted(set(strengths), reverse=True):
        solver.set_params(C=1 / (strength * len(train.labels)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            solver.fit(inputs, train.labels)
        weight, bias = solver.coef_, solver.intercept_
        if len(weight) == 1:  # for two classes scikit-learn stores only the second's log odds
            weight, bias = (np.concatenate([np.zeros_like(values), values]) for values in (weight, bias))
        converged = int(solver.n_iter_.max()) < ITERATIONS
        yield LinearClassifier(
            mean, deviation, weight.astype(np.float32), bias.astype(np.float32), solver.classes_, strength, converged
        )


def fit_logistic(train: Labelled, valid: Labelled, strengths: Sequence[float]) -> dict[str, Any]:
    """The classifier with the best accuracy on `valid`, with its `valid_accuracy`; of ties, the strongest L2 wins."""
    fitted = [(classifier, classifier.accuracy(valid)) for classifier in logistic_path(train, strengths)]
    best, accuracy = max(fitted, key=lambda pair: pair[1])
    return asdict(best) | {"valid_accuracy": accuracy}
