"""Several masks of one image: a masked model predicts under each, and the predictions are put to a vote.

The paper's way with BERT models: five masks, the commonest prediction, ties at random.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from data_prep.common.seeding import generator
from pipeline.evaluate.context import Evaluation, ImageSubset
from pipeline.evaluate.features.labelled import Labelled, Rows, baselines, layers_of
from pipeline.evaluate.features.pooled import pooled_features

MASKS = 5


def features_per_mask(evaluation: Evaluation, images: ImageSubset) -> dict[str, list[Labelled]]:
    """By name, each layer under each of the masks (one where nothing is masked), and each baseline. All ranks call it.

    The test images are read by this, once, when everything is chosen.
    """
    masks = range(MASKS if evaluation.masked else 1)
    seen = [layers_of(pooled_features(evaluation, images, mask), images.labels) for mask in masks]
    return {name: [layers[name] for layers in seen] for name in seen[0]} | {
        name: [base] for name, base in baselines(evaluation, images).items()
    }


def majority_vote(predicted: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The commonest label of each image, int (N,), of predictions (masks, N); among equals one at random."""
    votes = (predicted[:, None] == predicted[None]).sum(axis=0)  # (masks, N): how many agree with each
    # Labels with equally many votes have equally many voters, so a random voter is a random label.
    chosen = (votes + random.uniform(0, 0.5, votes.shape)).argmax(axis=0)  # (N,)
    return np.take_along_axis(predicted, chosen[None], axis=0)[0]


def score(evaluation: Evaluation, test: list[Labelled], predict: Callable[[Rows], np.ndarray]) -> dict[str, Any]:
    """Scores of `predict` on the test images: under the first mask alone, and of a masked model also by vote."""
    return score_predictions(evaluation, np.stack([predict(masked.features) for masked in test]), test[0].labels)


def score_predictions(evaluation: Evaluation, predicted: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Scores of predictions int (masks, N) on the test images: of the first mask alone, and of several also by vote.

    Of the first: accuracy, its binomial standard error, and accuracy by class (None where there is no image). labels:
    int (N,). A class that train lacks is never predicted: its images count as wrong.
    """
    right, classes = predicted == labels, len(evaluation.shards.classes)  # (masks, N)
    counts, hits = np.bincount(labels, minlength=classes), np.bincount(labels, weights=right[0], minlength=classes)
    accuracy = float(right[0].mean())
    scores = {
        "test_accuracy": accuracy,
        "test_standard_error": float(np.sqrt(accuracy * (1 - accuracy) / len(labels))),
        "test_accuracy_by_class": [float(h / n) if n else None for h, n in zip(hits, counts, strict=True)],
    }
    if len(predicted) == 1:
        return scores
    voted = majority_vote(predicted, generator(evaluation.seed, "votes"))
    return scores | {
        "masks": len(predicted),
        "test_accuracy_by_mask": right.mean(axis=1).tolist(),
        "ensembled_test_accuracy": float((voted == labels).mean()),
    }
