"""Predictions and classification metrics of the classifiers that are trained by gradient descent."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from sklearn.metrics import confusion_matrix
from torch import nn

from pipeline.evaluate.context import Evaluation, ImageSubset
from pipeline.evaluate.metrics.mask_ensemble import MASKS, score_predictions
from pipeline.results.figures import new_figure, save_figure

NAMES_SHOWN = 30
"""With more classes, the confusion matrix has no class names."""
COUNTS_SHOWN = 15
"""With more classes, the confusion matrix has no counts in its cells."""


def predict(
    evaluation: Evaluation,
    images: ImageSubset,
    label: str,
    logits: Callable[[torch.Tensor, np.ndarray], torch.Tensor],
) -> np.ndarray:
    """The predicted class of each image, int64 (N, ...), the same on every rank; -1 where logits are NaN or Inf.

    logits: a function of tokens, long (B, T), and their numbers in the split, int64 (B,), that returns (B, ..., C). All
    ranks call it.
    """
    mine = []
    with torch.inference_mode(), evaluation.accelerator.autocast():
        for rows, tokens in evaluation.batches(images, label):
            scores = logits(tokens, images.indices[rows]).float()  # (B, ..., C)
            classes = scores.argmax(-1).masked_fill(~scores.isfinite().all(-1), -1)  # (B, ...)
            mine.append((rows, classes.cpu().numpy()))
    parts = sorted(gather_object(mine), key=lambda part: part[0].start)
    return np.concatenate([classes for _, classes in parts])


def predict_classes(
    evaluation: Evaluation, classifier: nn.Module, images: ImageSubset, label: str, draw: int = 0
) -> np.ndarray:
    """The class that a classifier predicts for each image, int64 (N,), by `predict`. All ranks call it."""

    def logits(tokens: torch.Tensor, indices: np.ndarray) -> torch.Tensor:
        inputs, _ = evaluation.inputs_and_targets(tokens, indices, draw)
        return classifier(inputs)[1]  # (B, C)

    return predict(evaluation, images, label, logits)


def valid_accuracy(evaluation: Evaluation, classifier: nn.Module, images: ImageSubset) -> np.ndarray:
    """Fraction of the images that the classifier predicts correctly, (1,). All ranks call it."""
    predicted = predict_classes(evaluation, classifier, images, "validation")
    return (predicted == images.labels).mean(keepdims=True)


def test_scores(
    evaluation: Evaluation, images: ImageSubset, predict_under: Callable[[int], np.ndarray]
) -> tuple[dict[str, Any], np.ndarray]:
    """Scores under the first mask, and of a masked model also by majority vote over the masks.

    The scores are accuracy, its standard error, accuracy by class, and the confusion matrix (rows are the true classes;
    predictions of -1 are excluded). predict_under: maps the number of a mask to the predicted classes, int (N,).
    Returns the scores and the classes predicted under the first mask.
    """
    predicted = np.stack([predict_under(draw) for draw in range(MASKS if evaluation.masked else 1)])  # (masks, N)
    table = confusion_matrix(images.labels, predicted[0], labels=range(len(evaluation.shards.classes)))
    scores = score_predictions(evaluation, predicted, images.labels)
    return scores | {"confusion": table.tolist()}, predicted[0]


def accuracy_text(result: dict[str, Any]) -> str:
    """The accuracy on the test images, for a summary."""
    text = f"test accuracy {result['test_accuracy']:.1%}"
    voted = result.get("ensembled_test_accuracy")
    return text if voted is None else f"{text} ({voted:.1%} by vote over {result['masks']} masks)"


def draw_confusion(result: dict[str, Any], path: Path) -> None:
    """Draws `confusion`, each row as fractions of the class's images."""
    counts = np.array(result["confusion"])  # (C, C)
    classes = len(counts)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, axes = new_figure(7.0, 6.2)
    image = axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
    axes.grid(False)
    axes.set(xlabel="predicted class", ylabel="true class")
    if classes <= NAMES_SHOWN:
        axes.set_xticks(range(classes), result["class_names"], rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(classes), result["class_names"])
    if classes <= COUNTS_SHOWN:
        for (row, column), count in np.ndenumerate(counts):
            ink = "white" if shares[row, column] > 0.55 else "#333333"
            axes.text(column, row, str(count), ha="center", va="center", fontsize=7, color=ink)
    figure.colorbar(image, ax=axes, label="fraction of the class's test images (%)", shrink=0.8)
    save_figure(figure, path)
