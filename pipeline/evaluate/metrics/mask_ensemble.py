"""Mask ensembles: a masked model predicts under several masks of an image, and the majority decides.

The paper does so with its BERT models: five masks, the most common prediction, ties broken at random.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.stats import binomtest

from data_prep.common.seeding import generator
from pipeline.evaluate.context import Evaluation, ImageSubset
from pipeline.evaluate.features.labelled import Labelled, Rows, baselines, layers_of
from pipeline.evaluate.features.pooled import pooled_features

MASKS = 5
CONFIDENCE = 0.95


def features_per_mask(evaluation: Evaluation, images: ImageSubset) -> dict[str, list[Labelled]]:
    """By name, each layer under each mask (one entry for a model without masks), and each baseline.

    All ranks call it. Tasks call it for the test images only once, after everything is chosen.
    """
    masks = range(MASKS if evaluation.masked else 1)
    seen = [layers_of(pooled_features(evaluation, images, mask), images.labels) for mask in masks]
    return {name: [layers[name] for layers in seen] for name in seen[0]} | {
        name: [base] for name, base in baselines(evaluation, images).items()
    }


def majority_vote(predicted: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The most common label of each image, int (N,), of predictions (masks, N); ties are broken at random."""
    votes = (predicted[:, None] == predicted[None]).sum(axis=0)  # (masks, N): the number of masks that agree
    # Labels with equally many votes have equally many voters, so a random voter is a random label.
    chosen = (votes + random.uniform(0, 0.5, votes.shape)).argmax(axis=0)  # (N,)
    return np.take_along_axis(predicted, chosen[None], axis=0)[0]


def score(
    evaluation: Evaluation, test: list[Labelled], predict: Callable[[Rows], np.ndarray], classes: np.ndarray
) -> dict[str, Any]:
    """Scores of `predict` on the test images: under the first mask, and of a masked model also by majority vote."""
    predicted = np.stack([predict(masked.features) for masked in test])
    return score_predictions(evaluation, predicted, test[0].labels, classes)


def score_predictions(
    evaluation: Evaluation, predicted: np.ndarray, labels: np.ndarray, classes: np.ndarray
) -> dict[str, Any]:
    """Scores of predictions int (masks, N) on the test images with labels int (N,).

    For the first mask: accuracy with its 95% interval and its binomial standard error (both None for a single image),
    accuracy by class (None for a class without test images), in the order of `classes` (the labels that occur,
    ascending), and the mean of these. With several masks, also the accuracy of their majority vote. A class that train
    lacks is never predicted, so its images count as wrong.
    """
    right = predicted == labels  # (masks, N)
    place = np.searchsorted(classes, labels)  # (N,)
    counts, hits = (np.bincount(place, weights, minlength=len(classes)) for weights in (None, right[0]))
    by_class = [float(h / n) if n else None for h, n in zip(hits, counts, strict=True)]
    accuracy, several = float(right[0].mean()), len(labels) > 1
    scores = {
        "test_accuracy": accuracy,
        "test_accuracy_interval": wilson_interval(right[0]),
        "test_standard_error": float(np.sqrt(accuracy * (1 - accuracy) / len(labels))) if several else None,
        "test_mean_per_class_accuracy": float(np.mean([each for each in by_class if each is not None])),
        "test_accuracy_by_class": by_class,
    }
    if len(predicted) == 1:
        return scores
    voted = majority_vote(predicted, generator(evaluation.seed, "votes"))
    return scores | {
        "masks": len(predicted),
        "test_accuracy_by_mask": right.mean(axis=1).tolist(),
        "ensembled_test_accuracy": float((voted == labels).mean()),
        "ensembled_test_accuracy_interval": wilson_interval(voted == labels),
    }


def wilson_interval(right: np.ndarray) -> list[float] | None:
    """The 95% Wilson interval [low, high] of a fraction, from bool (N,); None if N is 1.

    Unlike the binomial standard error it is not zero if all or none are right.
    """
    if len(right) == 1:
        return None
    interval = binomtest(int(right.sum()), len(right)).proportion_ci(CONFIDENCE, method="wilson")
    return [float(interval.low), float(interval.high)]
