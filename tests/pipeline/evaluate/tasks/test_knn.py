"""Nearest neighbors against scikit-learn's, with cosine distances and the same weights."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from pipeline.evaluate.features import labelled
from pipeline.evaluate.features.labelled import Labelled, color_histogram, raw_pixels
from pipeline.evaluate.features.pooled import pooled_features
from pipeline.evaluate.options import KnnOptions
from pipeline.evaluate.tasks import knn
from pipeline.evaluate.tasks.knn import KNN, predictions

CPU = torch.device("cpu")


def scikit_learn(train: Labelled, k: int, temperature: float = 0.07) -> KNeighborsClassifier:
    neighbors = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    )
    return neighbors.fit(np.asarray(train.features, np.float64), train.labels)


@pytest.mark.parametrize("temperature", [0.005, 0.07, 1.0])
def test_the_votes_match_scikit_learn(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks that divide neither the training images nor the queries; one block has fewer rows than k."""
    monkeypatch.setattr(labelled, "ROWS_AT_ONCE", 130)
    monkeypatch.setattr(knn, "QUERIES_AT_ONCE", 77)
    random = np.random.default_rng(0)
    labels = 3 * random.integers(0, 5, 2500)
    features = (random.normal(size=(5, 20))[labels // 3] + 2 * random.normal(size=(2500, 20))).astype(np.float32)
    train, queries = Labelled(features[:1000], labels[:1000]), features[1000:]
    numbers = [1, 10, 100, 200]
    found = predictions(train, queries, numbers, temperature, CPU)
    for k, predicted in zip(numbers, found, strict=True):
        expected = scikit_learn(train, k, temperature).predict(queries)
        assert (predicted == expected).mean() >= 0.998
        assert (predicted == labels[1000:]).mean() == pytest.approx((expected == labels[1000:]).mean(), abs=0.002)


def test_the_task_tests_the_layer_and_k_that_did_best_on_validation(
    model_folder: Path, evaluation_of: Callable
) -> None:
    evaluation = evaluation_of(model_folder)
    result = KNN(KnnOptions(k=[5, 20, 300, 400])).measure(evaluation)

    images = {name: evaluation.images(name, labelled=True) for name in ("train", "valid", "test")}
    labels = {name: chosen.labels for name, chosen in images.items()}
    features = {name: pooled_features(evaluation, chosen) for name, chosen in images.items()}
    assert (result["k"], result["k_left_out"]) == ([5, 20, 300], [400])  # train has 323

    def score(train: np.ndarray, queries: np.ndarray, split: str, k: int) -> float:
        return scikit_learn(Labelled(train, labels["train"]), k).score(queries, labels[split])

    table = [
        [score(features["train"][layer], features["valid"][layer], "valid", k) for k in (5, 20, 300)]
        for layer in range(4)
    ]
    np.testing.assert_allclose(result["valid_accuracy_by_layer_and_k"], table, atol=1e-9)
    best, k = result["best_layer"], result["best_k"]
    assert table[best][[5, 20, 300].index(k)] == np.max(table)
    assert result["test_accuracy"] == pytest.approx(score(features["train"][best], features["test"][best], "test", k))
    tokens = {name: chosen.tokens() for name, chosen in images.items()}
    for name, represent in (
        ("raw_pixel", lambda some: raw_pixels(some, evaluation.shards.palette)),
        ("color_histogram", lambda some: color_histogram(some, 24)),
    ):
        known = {split: represent(tokens[split]) for split in tokens}
        by_k = {k: score(known["train"], known["valid"], "valid", k) for k in (5, 20, 300)}
        assert result[f"{name}_valid_accuracy"] == pytest.approx(max(by_k.values()))
        tested = score(known["train"], known["test"], "test", result[f"{name}_best_k"])
        assert result[f"{name}_test_accuracy"] == pytest.approx(tested)
    assert (evaluation.results / "knn.png").read_bytes().startswith(b"\x89PNG")


def test_a_masked_model_votes_over_five_masks(masked_folder: Path, evaluation_of: Callable) -> None:
    evaluation = evaluation_of(masked_folder)
    result = KNN(KnnOptions(k=[20])).measure(evaluation)
    images = {name: evaluation.images(name, labelled=True) for name in ("train", "test")}
    layer = result["best_layer"]
    bank = Labelled(pooled_features(evaluation, images["train"])[layer], images["train"].labels)
    neighbors, labels = scikit_learn(bank, 20), images["test"].labels
    expected = [neighbors.score(pooled_features(evaluation, images["test"], n)[layer], labels) for n in range(5)]
    assert result["test_accuracy_by_mask"] == pytest.approx(expected)
    assert result["test_accuracy"] == pytest.approx(expected[0])
    assert len(set(expected)) > 1


def test_more_neighbors_than_images_are_an_error(model_folder: Path, evaluation_of: Callable) -> None:
    with pytest.raises(ValueError, match=r"knn\.k is \[100, 200\], but .* has 90 labelled images in train"):
        KNN(KnnOptions(k=[100, 200])).measure(evaluation_of(model_folder, train_images=90))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": []}, r"knn\.k is \[\]; it must be a list of numbers of at least 1"),
        ({"k": [10, 0]}, r"knn\.k is \[10, 0\]"),
        ({"temperature": 0.0}, r"knn\.temperature is 0.0; it must be above 0"),
    ],
)
def test_invalid_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KnnOptions(**options)
