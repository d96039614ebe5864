"""Weighted k nearest neighbours on the features of every layer: what they tell without any training.

As instance discrimination (Wu et al. 2018) and DINO (Caron et al. 2021) measure it: features are scaled to length 1,
the k training pictures of the greatest cosine similarity s vote for their classes with weight exp(s / T), T = 0.07.
Layer and k are chosen on the validation split (of equals the first layer, then the least k); the test split is looked
at once. Raw pixels and colour histograms, with a k of their own, stand beside it.

`knn.json` has, besides what every result has (fractions for accuracies):

    k, k_left_out, temperature        the numbers of neighbours tried; those that the training pictures are too few for
    valid_accuracy_by_layer_and_k     rows are layers 0..L, columns as `k`
    valid_accuracy_by_layer           at the best k
    best_layer, best_k
    test_accuracy, test_standard_error, test_accuracy_by_class (None: no test picture of that class)
    masks, test_accuracy_by_mask, ensembled_test_accuracy      masked models only: see votes.py
    raw_pixel_{valid_accuracy,test_accuracy,best_k}, color_histogram_{...}
    classes, class_names, {train,valid,test}_images, images_by_class, absent_classes, majority_class_test_accuracy
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.evaluate.context import Evaluation, from_first
from pipeline.evaluate.features.labelled import (
    BASELINES,
    Labelled,
    Rows,
    description,
    in_blocks,
    known_features,
    labelled_splits,
    layer_name,
)
from pipeline.evaluate.features.labelled import unfit as unfit
from pipeline.evaluate.metrics.mask_ensemble import judged, looks
from pipeline.evaluate.work_sharing import Piece, shared_out
from pipeline.results.figures import draw_by_layer

if TYPE_CHECKING:
    import torch

FIGURE = "knn.png"
NEIGHBOURS = (10, 20, 100, 200)
QUERIES_AT_ONCE = 1024
"""With blocks of 8192 training pictures a table of similarities takes 32 MiB."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Weighted k nearest neighbours over every layer."""

    k: list[int] = field(default_factory=lambda: list(NEIGHBOURS))
    """Numbers of neighbours to try; those above the number of training pictures are left out."""
    temperature: float = 0.07
    """A neighbour of cosine similarity s has the weight exp(s / temperature)."""

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1:
            raise ValueError(f"knn.k is {self.k}; it must be a list of numbers of at least 1.")
        if self.temperature <= 0:
            raise ValueError(f"knn.temperature is {self.temperature}; it must be above 0.")


def nearest(bank: Rows, queries: Rows, count: int, device: "torch.device") -> "tuple[torch.Tensor, torch.Tensor]":
    """Cosine similarity, fp32 (N, count) from large to small, and row in `bank` of each query's neighbours.

    The bank is read once, in blocks; the device holds the queries, a block, and a table of similarities.
    """
    import torch

    asked = torch.cat([block for _, block in _of_length_one(queries, device)])  # (N, D)
    similarity = torch.full((len(asked), count), -torch.inf, device=device)
    found = torch.zeros((len(asked), count), dtype=torch.int64, device=device)
    for place, block in _of_length_one(bank, device):
        rows = torch.arange(place.start, place.stop, device=device)  # (b,)
        for start in range(0, len(asked), QUERIES_AT_ONCE):
            some = slice(start, start + QUERIES_AT_ONCE)
            near, where = (asked[some] @ block.T).topk(min(count, len(rows)), dim=1)  # (n, count) each
            both = torch.cat([similarity[some], near], dim=1)
            similarity[some], kept = both.topk(count, dim=1)
            found[some] = torch.cat([found[some], rows[where]], dim=1).gather(1, kept)
    return similarity, found


def _of_length_one(features: Rows, device: "torch.device") -> "Iterator[tuple[slice, torch.Tensor]]":
    import torch
    from torch.nn import functional

    for place, block in in_blocks(features):
        yield place, functional.normalize(torch.from_numpy(block).to(device), dim=1)


def predictions(
    train: Labelled, queries: Rows, numbers: list[int], temperature: float, device: "torch.device"
) -> np.ndarray:
    """The label that each query's k neighbours vote for, for each k in `numbers`: int (numbers, N)."""
    import torch

    classes, targets = np.unique(train.labels, return_inverse=True)  # (C,), (bank,)
    similarity, found = nearest(train.features, queries, max(numbers), device)  # (N, k) each
    weights = ((similarity - similarity[:, :1]) / temperature).exp()  # of the nearest 1, whatever the temperature
    voters = torch.from_numpy(targets).to(device)[found]  # (N, k)
    chosen = np.empty((len(numbers), len(queries)), np.int64)
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        some = slice(start, start + QUERIES_AT_ONCE)
        for row, k in enumerate(numbers):
            votes = weights.new_zeros(len(weights[some]), len(classes))  # (n, C)
            votes.scatter_add_(1, voters[some, :k], weights[some, :k])
            chosen[row, some] = votes.argmax(dim=1).cpu().numpy()
    return classes[chosen]


def check(evaluation: Evaluation, options: Options, _coming: list[str]) -> None:
    """Raises ValueError if train has fewer pictures than the least k."""
    _numbers(evaluation, options, len(evaluation.pictures("train", labelled=True)))


def measure(evaluation: Evaluation, options: Options) -> dict[str, Any]:
    """Votes with the neighbours of every layer and of both baselines, and draws accuracy by layer.

    Raises ValueError if train, valid or test is absent or unlabelled, train has a single class, or fewer pictures
    than the least k.
    """
    pictures = labelled_splits(evaluation, "knn")
    numbers = _numbers(evaluation, options, len(pictures["train"]))
    if len(numbers) < len(set(options.k)):
        above = ", ".join(str(k) for k in sorted(set(options.k) - set(numbers)))
        evaluation.say(f"knn: k = {above} left out, train has {len(pictures['train'])} labelled pictures")
    device, temperature = evaluation.accelerator.device, options.temperature
    bank, valid = (known_features(evaluation, pictures[split]) for split in ("train", "valid"))

    def validated(name: str) -> Piece:
        def work() -> dict[str, Any]:
            predicted = predictions(bank[name], valid[name].features, numbers, temperature, device)  # (k, N)
            return {"valid_accuracy": (predicted == valid[name].labels).mean(axis=1).tolist()}

        return work

    found = shared_out(evaluation, "nearest neighbours", {name: validated(name) for name in bank})
    table = np.array([found[name]["valid_accuracy"] for name in bank if name not in BASELINES])  # (L+1, k)
    layer, best = (int(place) for place in np.unravel_index(table.argmax(), table.shape))
    test = looks(evaluation, pictures["test"])

    def on_test() -> dict[str, Any]:
        def voted(name: str, k: int, queries: Rows) -> np.ndarray:
            return predictions(bank[name], queries, [k], temperature, device)[0]

        chosen = layer_name(layer)
        scores = judged(evaluation, test[chosen], lambda queries: voted(chosen, numbers[best], queries))
        for name in BASELINES:
            accuracies = found[name]["valid_accuracy"]
            k = numbers[int(np.argmax(accuracies))]
            predicted = voted(name, k, test[name][0].features)
            scores[f"{name}_best_k"] = k
            scores[f"{name}_valid_accuracy"] = max(accuracies)
            scores[f"{name}_test_accuracy"] = float((predicted == test[name][0].labels).mean())
        return scores

    result = description(evaluation, pictures) | {
        "k": numbers,
        "k_left_out": [k for k in options.k if k not in numbers],
        "temperature": temperature,
        "valid_accuracy_by_layer_and_k": table.tolist(),
        "valid_accuracy_by_layer": table[:, best].tolist(),
        "best_layer": layer,
        "best_k": numbers[best],
        **from_first(evaluation.accelerator, lambda: evaluation.kept.once("test", on_test)),
    }
    from_first(evaluation.accelerator, lambda: draw_by_layer(result, evaluation.results / FIGURE))
    return result


def summary(result: dict[str, Any]) -> str:
    """The result in a line."""
    voted = f", {result['ensembled_test_accuracy']:.1%} by vote" if "ensembled_test_accuracy" in result else ""
    return (
        f"test accuracy {result['test_accuracy']:.1%}{voted} with {result['best_k']} neighbours at layer "
        f"{result['best_layer']}, best on validation; raw pixels {result['raw_pixel_test_accuracy']:.1%}, "
        f"colour histogram {result['color_histogram_test_accuracy']:.1%}"
    )


def _numbers(evaluation: Evaluation, options: Options, pictures: int) -> list[int]:
    """The numbers of neighbours that there are pictures for, ascending. Raises ValueError if there is none."""
    numbers = sorted({k for k in options.k if k <= pictures})
    if not numbers:
        raise ValueError(
            f"knn.k is {options.k}, but {evaluation.shards.path} has {pictures} labelled pictures in train; "
            "give a number of neighbours that is at most that."
        )
    return numbers
