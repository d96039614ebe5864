"""What classifiers say of pictures, and how well: for the tasks that train one by gradient descent."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data_prep.common.files import atomic_write
from pipeline.evaluate.classifiers.finetune_loop import predictions
from pipeline.evaluate.context import Evaluation, Pictures
from pipeline.evaluate.metrics.mask_ensemble import MASKS, scores_of_looks

NAMES_SHOWN = 30
"""A confusion matrix of more classes has no names beside it."""
COUNTS_SHOWN = 15
"""And one of more than these no counts in its cells."""


def classes_said(
    evaluation: Evaluation, classifier: nn.Module, pictures: Pictures, label: str, draw: int = 0
) -> np.ndarray:
    """The class of each picture as the classifier says, int64 (N,); -1 where it says nothing. All ranks call it."""

    def logits(tokens: torch.Tensor, indices: np.ndarray) -> torch.Tensor:
        inputs, _ = evaluation.inputs_and_targets(tokens, indices, draw)
        return classifier(inputs)[1]  # (B, C)

    return predictions(evaluation, pictures, label, logits)


def valid_accuracy(evaluation: Evaluation, classifier: nn.Module, pictures: Pictures) -> np.ndarray:
    """Fraction of the pictures whose class the classifier says, (1,). All ranks call it."""
    said = classes_said(evaluation, classifier, pictures, "validation")
    return (said == pictures.labels).mean(keepdims=True)


def test_scores(evaluation: Evaluation, pictures: Pictures, said: Callable[[int], np.ndarray]) -> dict[str, Any]:
    """Accuracy, its standard error, by class, and the confusion matrix; of a masked model also by vote of its masks.

    said: of the draw of hidden colours to the classes of the test pictures, int (N,).
    """
    predicted = np.stack([said(draw) for draw in range(MASKS if evaluation.masked else 1)])  # (masks, N)
    table = confusion(predicted[0], pictures.labels, len(evaluation.shards.classes))
    return scores_of_looks(evaluation, predicted, pictures.labels) | {"confusion": table.tolist()}


def test_words(result: dict[str, Any]) -> str:
    """The accuracy on the test pictures in words."""
    words = f"test accuracy {result['test_accuracy']:.1%}"
    voted = result.get("ensembled_test_accuracy")
    return words if voted is None else f"{words} ({voted:.1%} by the vote of {result['masks']} masks)"


def confusion(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """How often a picture of each class (row) was taken for each class (column), int64 (C, C); -1 is left out."""
    valid = predicted >= 0
    cells = labels[valid].astype(np.int64) * classes + predicted[valid]
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


def draw_confusion(result: dict[str, Any], path: Path) -> None:
    """Draws `confusion`, each row as shares of the class's pictures."""
    from pipeline.results.figures import new_figure, save_figure

    counts = np.array(result["confusion"])  # (C, C)
    classes = len(counts)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, axes = new_figure()
    figure.set_size_inches(7.0, 6.2)
    image = axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
    axes.grid(False)
    axes.set_xlabel("class said")
    axes.set_ylabel("class of the picture")
    if classes <= NAMES_SHOWN:
        axes.set_xticks(range(classes), result["class_names"], rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(classes), result["class_names"])
    if classes <= COUNTS_SHOWN:
        for (row, column), count in np.ndenumerate(counts):
            ink = "white" if shares[row, column] > 0.55 else "#333333"
            axes.text(column, row, str(count), ha="center", va="center", fontsize=7, color=ink)
    figure.colorbar(image, ax=axes, label="share of the class's test pictures (%)", shrink=0.8)
    with atomic_write(path) as temporary:
        save_figure(figure, temporary)
