"""Predictions and classification metrics of the classifiers that are trained by gradient descent."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn

from pipeline.evaluate.context import Evaluation, ImageSubset
from pipeline.evaluate.metrics.mask_ensemble import MASKS, score_predictions
from pipeline.results.figures import new_figure, save_figure
from pipeline.results.text import image_count

CLASSES_SHOWN = 30
"""With more classes, the figure has only those that are confused most: their names can be read."""
COUNTS_SHOWN = 15
"""With more classes, the confusion matrix has no counts in its cells."""
CLASSES_IN_TABLE = 100
"""With more classes, `confusion` lists its cells: a table has as many as the square of the classes."""
CONFUSIONS_LISTED = 15
LONGEST_NAME = 24
"""Characters of a class name in the figure; ImageNet's names are up to 120 long."""


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
    evaluation: Evaluation, images: ImageSubset, classes: np.ndarray, predict_under: Callable[[int], np.ndarray]
) -> tuple[dict[str, Any], np.ndarray]:
    """Scores under the first mask, and of a masked model also by majority vote over the masks.

    classes: the labels that occur, ascending. predict_under: maps the number of a mask to the predicted classes, int
    (N,). Returns the scores of `score_predictions` with `confusions` of them, and the classes predicted under the first
    mask.
    """
    predicted = np.stack([predict_under(draw) for draw in range(MASKS if evaluation.masked else 1)])  # (masks, N)
    scores = score_predictions(evaluation, predicted, images.labels, classes)
    names = [evaluation.shards.classes[label] for label in classes]
    return scores | confusions(images.labels, predicted[0], classes, names), predicted[0]


def confusions(labels: np.ndarray, predicted: np.ndarray, classes: np.ndarray, names: list[str]) -> dict[str, Any]:
    """`confusion` and `top_confusions` of predictions int (N,) for labels int (N,), with the classes' names.

    confusion: the number of images by true and predicted class, both numbered in the order of `classes`: a table, rows
    are the true classes; with more than CLASSES_IN_TABLE classes its cells that are not zero, as three lists `true`,
    `predicted` and `images`. Predictions outside of `classes` are excluded (-1: NaN or Inf). top_confusions: the pairs
    of different classes with the most images, as {true_class, predicted_class, images, fraction_of_class}.
    """
    known = np.isin(predicted, classes)
    places = np.stack([np.searchsorted(classes, part[known]) for part in (labels, predicted)])  # (2, n)
    (true, found), images = np.unique(places, axis=1, return_counts=True)  # (cells,) each
    cells: Any = {"true": true.tolist(), "predicted": found.tolist(), "images": images.tolist()}
    if len(classes) <= CLASSES_IN_TABLE:
        table = np.zeros((len(classes), len(classes)), np.int64)
        table[true, found] = images
        cells = table.tolist()
    of_class = np.bincount(np.searchsorted(classes, labels), minlength=len(classes))  # (C,)
    wrong = np.flatnonzero(true != found)
    most = wrong[np.argsort(-images[wrong], kind="stable")][:CONFUSIONS_LISTED]
    top = [
        {
            "true_class": names[true[cell]],
            "predicted_class": names[found[cell]],
            "images": int(images[cell]),
            "fraction_of_class": round(float(images[cell] / of_class[true[cell]]), 4),
        }
        for cell in most
    ]
    return {"confusion": cells, "top_confusions": top}


def accuracy_text(result: dict[str, Any]) -> str:
    """The accuracy on the test images, for a summary."""
    text = f"test accuracy {result['test_accuracy']:.1%} of {image_count(result['test_images'])}"
    voted = result.get("ensembled_test_accuracy")
    return text if voted is None else f"{text} ({voted:.1%} by vote over {result['masks']} masks)"


def shown_confusions(result: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The table of `confusion`, int (C, C), the images of each true class, (C,), and the names; of at most
    CLASSES_SHOWN classes, those with the most images in pairs of different classes.

    The images of a true class are those in all cells of `confusion`, also in cells that are not shown."""
    cells, names = result["confusion"], result["class_names"]
    if isinstance(cells, list):
        true, found = np.nonzero(cells)
        images = np.array(cells)[true, found]
    else:
        true, found, images = (np.array(cells[key], np.int64) for key in ("true", "predicted", "images"))
    of_class, confused = np.zeros((2, len(names)), np.int64)
    np.add.at(of_class, true, images)
    for ends in (true, found):
        np.add.at(confused, ends, np.where(true != found, images, 0))
    shown = np.sort(np.argsort(-confused, kind="stable")[:CLASSES_SHOWN])
    inside = np.isin(true, shown) & np.isin(found, shown)
    table = np.zeros((len(shown), len(shown)), np.int64)
    table[np.searchsorted(shown, true[inside]), np.searchsorted(shown, found[inside])] = images[inside]
    return table, of_class[shown], [names[place] for place in shown]


def draw_confusion(result: dict[str, Any], path: Path) -> None:
    """Draws the table of `shown_confusions`, each row as fractions of the class's images."""
    counts, of_class, names = shown_confusions(result)
    classes = len(counts)
    shares = counts / np.maximum(of_class[:, None], 1)
    figure, axes = new_figure(7.0, 6.2)
    image = axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
    axes.grid(False)
    axes.set(xlabel="predicted class", ylabel="true class")
    if classes < len(result["class_names"]):
        axes.set_title(f"the {classes} of {len(result['class_names']):,} classes that are confused most", fontsize=10)
    labels = [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…" for name in names]
    axes.set_xticks(range(classes), labels, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(classes), labels)
    axes.tick_params(labelsize=10 if classes <= COUNTS_SHOWN else 7)
    if classes <= COUNTS_SHOWN:
        for (row, column), count in np.ndenumerate(counts):
            ink = "white" if shares[row, column] > 0.55 else "#333333"
            axes.text(column, row, str(count), ha="center", va="center", fontsize=7, color=ink)
    figure.colorbar(image, ax=axes, label="fraction of the class's test images (%)", shrink=0.8)
    save_figure(figure, path)
