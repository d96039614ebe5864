"""Weighted k nearest neighbors on the features of every layer: a probe without training.

As in instance discrimination (Wu et al. 2018) and DINO (Caron et al. 2021): features are normalized to length 1, and
the k training images with the largest cosine similarity s vote for their classes with weight exp(s / T), T = 0.07.
Layer and k are chosen on the validation split (of ties, the first layer, then the smallest k); the test split is used
once. Raw pixels and color histograms, each with its own best k, give baselines.

`knn.json` has these keys, in addition to the keys of every result (accuracies are fractions):

    k, k_left_out, temperature        the k that were tried; the k that exceed the number of training images
    valid_accuracy_by_layer_and_k     rows are layers 0..L, columns as `k`
    valid_accuracy_by_layer           at the best k
    best_layer, best_k
    test_accuracy, test_accuracy_interval, test_standard_error, test_accuracy_by_class, test_mean_per_class_accuracy
    masks, test_accuracy_by_mask, ensembled_test_accuracy      masked models only: see mask_ensemble.py
    raw_pixel_{valid_accuracy,test_accuracy,best_k}, color_histogram_{...}
    classes, class_names, class_labels, {train,valid,test}_images, images_by_class, absent_classes,
    majority_class_test_accuracy; as in linear_probe.py
"""

from collections.abc import Collection, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from pipeline.distributed import from_first
from pipeline.evaluate.context import Evaluation
from pipeline.evaluate.features.labelled import (
    BASELINES,
    Labelled,
    Rows,
    description,
    in_blocks,
    known_features,
    labelled_splits,
    layer_name,
    occurring_classes,
)
from pipeline.evaluate.metrics.mask_ensemble import features_per_mask, score
from pipeline.evaluate.options import KnnOptions
from pipeline.evaluate.task import LabelledTask
from pipeline.evaluate.work_sharing import map_over_ranks
from pipeline.results.figures import draw_by_layer, draw_or_log
from pipeline.results.text import image_count

FIGURE = "knn.png"
TINY = 1e-12
"""The least length that features are divided by."""
QUERIES_AT_ONCE = 1024
"""With blocks of 8192 training images a table of similarities takes 32 MiB."""


class KNN(LabelledTask[KnnOptions]):
    """Weighted k nearest neighbors on every layer."""

    title = "k-NN"

    def check(self, evaluation: Evaluation, earlier: Collection[str]) -> None:
        """Raises ValueError if train has fewer images than the smallest k."""
        self._numbers(evaluation, len(evaluation.images("train", labelled=True)))

    def measure(self, evaluation: Evaluation) -> dict[str, Any]:
        """Classifies by the neighbors in every layer and in both baselines, and draws accuracy by layer.

        Raises ValueError if train, valid or test is absent or unlabelled, train has a single class, or fewer images
        than the smallest k.
        """
        images = labelled_splits(evaluation, "knn")
        numbers, temperature = self._numbers(evaluation, len(images["train"])), self.options.temperature
        if len(numbers) < len(set(self.options.k)):
            above = ", ".join(str(k) for k in sorted(set(self.options.k) - set(numbers)))
            evaluation.log(f"knn: k = {above} skipped, train has {len(images['train'])} labelled images")
        bank, valid = (known_features(evaluation, images[split]) for split in ("train", "valid"))

        def vote(name: str, numbers: list[int], queries: Rows) -> np.ndarray:
            return predictions(bank[name], queries, numbers, temperature, evaluation.accelerator.device)

        def validation(name: str) -> dict[str, Any]:
            predicted = vote(name, numbers, valid[name].features)  # (k, N)
            return {"valid_accuracy": (predicted == valid[name].labels).mean(axis=1).tolist()}

        found = map_over_ranks(evaluation, "nearest neighbors", {name: partial(validation, name) for name in bank})
        table = np.array([found[name]["valid_accuracy"] for name in bank if name not in BASELINES])  # (L+1, k)
        layer, best = (int(index) for index in np.unravel_index(table.argmax(), table.shape))
        evaluation.log_if_at_limit("knn.k", self.options.k, [numbers[best]])
        test = features_per_mask(evaluation, images["test"])

        def on_test() -> dict[str, Any]:
            chosen = layer_name(layer)
            classes = occurring_classes(images)
            scores = score(evaluation, test[chosen], lambda queries: vote(chosen, [numbers[best]], queries)[0], classes)
            for name in BASELINES:
                accuracies = found[name]["valid_accuracy"]
                k = numbers[int(np.argmax(accuracies))]
                [predicted] = vote(name, [k], test[name][0].features)
                scores[f"{name}_best_k"] = k
                scores[f"{name}_valid_accuracy"] = max(accuracies)
                scores[f"{name}_test_accuracy"] = float((predicted == test[name][0].labels).mean())
            return scores

        result = description(evaluation, images) | {
            "k": numbers,
            "k_left_out": [k for k in self.options.k if k not in numbers],
            "temperature": temperature,
            "valid_accuracy_by_layer_and_k": table.tolist(),
            "valid_accuracy_by_layer": table[:, best].tolist(),
            "best_layer": layer,
            "best_k": numbers[best],
            **from_first(lambda: evaluation.cache.get_or_compute("test", on_test)),
        }
        from_first(lambda: draw_or_log(draw_by_layer, result, evaluation.results / FIGURE))
        return result

    @classmethod
    def summary(cls, result: dict[str, Any]) -> str:
        voted = f", {result['ensembled_test_accuracy']:.1%} by vote" if "ensembled_test_accuracy" in result else ""
        return (
            f"test accuracy {result['test_accuracy']:.1%}{voted} of {image_count(result['test_images'])} with "
            f"{result['best_k']} neighbors at layer {result['best_layer']}, best on validation; raw pixels "
            f"{result['raw_pixel_test_accuracy']:.1%}, color histogram {result['color_histogram_test_accuracy']:.1%}"
        )

    def _numbers(self, evaluation: Evaluation, images: int) -> list[int]:
        """The values of k up to the number of images, ascending. Raises ValueError if there are none."""
        numbers = sorted({k for k in self.options.k if k <= images})
        if not numbers:
            raise ValueError(
                f"knn.k is {self.options.k}, but {evaluation.shards.path} has {images} labelled images in train; "
                "give a k that is at most this number."
            )
        return numbers


def nearest(bank: Rows, queries: Rows, count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The neighbors of each query: cosine similarities, fp32 (N, count), descending, and rows in `bank`, (N, count).

    The bank is read once, in blocks. The device needs memory for the queries, a block, and a table of similarities.
    """
    normalized = torch.cat([block for _, block in _normalized_blocks(queries, device)])  # (N, D)
    similarity = torch.full((len(normalized), count), -torch.inf, device=device)
    found = torch.zeros((len(normalized), count), dtype=torch.int64, device=device)
    for span, block in _normalized_blocks(bank, device):
        rows = torch.arange(span.start, span.stop, device=device)  # (b,)
        for start in range(0, len(normalized), QUERIES_AT_ONCE):
            some = slice(start, start + QUERIES_AT_ONCE)
            top, columns = _products(normalized[some], block).topk(min(count, len(rows)), dim=1)  # (n, count) each
            both = torch.cat([similarity[some], top], dim=1)
            similarity[some], order = both.topk(count, dim=1)
            found[some] = torch.cat([found[some], rows[columns]], dim=1).gather(1, order)
    return similarity, found


def _normalized_blocks(features: Rows, device: torch.device) -> Iterator[tuple[slice, torch.Tensor]]:
    for span, block in in_blocks(features):
        rows = torch.from_numpy(block).to(device)
        rows /= torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(TINY)  # in place: the block is a copy
        yield span, rows


def _products(queries: torch.Tensor, block: torch.Tensor) -> torch.Tensor:  # (n, D), (b, D) -> (n, b)
    if queries.device.type == "cpu" and torch.backends.mkldnn.is_available():
        # oneDNN's, a sixth faster than torch's own where that is MKL's on an AMD processor.
        return torch.ops.mkldnn._linear_pointwise(queries, block, None, "none", [], "")
    return queries @ block.T


def predictions(
    train: Labelled, queries: Rows, numbers: list[int], temperature: float, device: torch.device
) -> np.ndarray:
    """The predicted label of each query, for each k in `numbers`: int (numbers, N)."""
    classes, targets = np.unique(train.labels, return_inverse=True)  # (C,), (bank,)
    similarity, found = nearest(train.features, queries, max(numbers), device)  # (N, k) each
    weights = ((similarity - similarity[:, :1]) / temperature).exp()  # the nearest has weight 1 at any temperature
    voters = torch.from_numpy(targets).to(device)[found]  # (N, k)
    chosen = np.empty((len(numbers), len(queries)), np.int64)
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        some = slice(start, start + QUERIES_AT_ONCE)
        for row, k in enumerate(numbers):
            votes = weights.new_zeros(len(weights[some]), len(classes))  # (n, C)
            votes.scatter_add_(1, voters[some, :k], weights[some, :k])
            chosen[row, some] = votes.argmax(dim=1).cpu().numpy()
    return classes[chosen]
