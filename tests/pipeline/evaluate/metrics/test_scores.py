"""Scores of predictions: intervals against the formula, few images, and labels with gaps or many classes."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, confusion_matrix

from data_prep.shards.reader import Split
from pipeline.evaluate.context import Evaluation, ImageSubset
from pipeline.evaluate.features.labelled import description
from pipeline.evaluate.metrics.classification import confusions, draw_confusion, shown_confusions
from pipeline.evaluate.metrics.mask_ensemble import score_predictions, wilson_interval

EVALUATION = cast(Evaluation, SimpleNamespace(seed=0))


def names_of(classes: np.ndarray) -> list[str]:
    return [f"class {label}" for label in classes]


class Names:
    """A name for every label."""

    def __getitem__(self, label: int) -> str:
        return f"class {label}"


def wilson(right: int, images: int) -> list[float]:
    """The formula of Wilson (1927)."""
    z, share = 1.959963984540054, right / images
    middle = share + z * z / (2 * images)
    half = z * math.sqrt(share * (1 - share) / images + z * z / (4 * images * images))
    return [(middle - half) / (1 + z * z / images), (middle + half) / (1 + z * z / images)]


@pytest.mark.parametrize(("right", "images"), [(0, 2), (2, 2), (5, 7), (50, 50), (848, 1000)])
def test_the_interval_is_wilsons(right: int, images: int) -> None:
    found = wilson_interval(np.arange(images) < right)
    assert found == pytest.approx(wilson(right, images), abs=1e-9)
    assert found is not None and found[0] < found[1]


def test_one_image_has_no_error() -> None:
    for predicted in ([[4]], [[4], [4]]):
        scores = score_predictions(EVALUATION, np.array(predicted), np.array([4]), np.array([2, 4]))
        assert scores["test_accuracy"] == 1.0
        assert scores["test_standard_error"] is None
        assert scores["test_accuracy_interval"] is None
        assert scores.get("ensembled_test_accuracy_interval") is None
        assert scores["test_accuracy_by_class"] == [None, 1.0]


def test_accuracy_by_class_and_its_mean_are_scikit_learns() -> None:
    random = np.random.default_rng(0)
    classes = np.array([3, 7, 900])
    labels = random.choice(classes[[0, 0, 0, 1, 2]], 400)
    predicted = np.where(random.random(400) < 0.5, labels, random.choice(classes, 400))
    scores = score_predictions(EVALUATION, predicted[None], labels, classes)
    assert scores["test_mean_per_class_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    table = confusion_matrix(labels, predicted)
    assert scores["test_accuracy_by_class"] == pytest.approx((table.diagonal() / table.sum(1)).tolist())
    assert confusions(labels, predicted, classes, names_of(classes))["confusion"] == table.tolist()


def test_labels_with_gaps_cost_as_many_numbers_as_there_are_classes() -> None:
    """A table over all numbers up to the largest label would have 4e18 cells."""
    splits = {"train": [5, 7, 5], "valid": [7], "test": [5, 2_000_000_000, 2_000_000_000]}
    images = {
        name: ImageSubset(cast(Split, None), np.arange(len(labels)), np.array(labels))
        for name, labels in splits.items()
    }
    evaluation = SimpleNamespace(shards=SimpleNamespace(classes=Names()))
    described = description(cast(Evaluation, evaluation), images)
    assert described["class_labels"] == [5, 7, 2_000_000_000]
    assert described["images_by_class"] == {"train": [2, 1, 0], "valid": [0, 1, 0], "test": [1, 0, 2]}
    assert described["absent_classes"]["train"] == ["class 2000000000"]
    assert described["majority_class_test_accuracy"] == pytest.approx(1 / 3)
    found = confusions(images["test"].labels, np.array([7, 5, -1]), np.array(described["class_labels"]),
                       described["class_names"])  # fmt: skip
    assert found["confusion"] == [[0, 1, 0], [0, 0, 0], [1, 0, 0]]
    assert found["top_confusions"] == [
        {"true_class": "class 5", "predicted_class": "class 7", "images": 1, "fraction_of_class": 1.0},
        {"true_class": "class 2000000000", "predicted_class": "class 5", "images": 1, "fraction_of_class": 0.5},
    ]


def test_a_thousand_classes_are_listed_and_the_figure_shows_the_most_confused(tmp_path: Path) -> None:
    random, classes = np.random.default_rng(0), np.arange(1000) * 3
    labels = random.choice(classes, 5000)
    predicted = np.where(random.random(5000) < 0.7, labels, random.choice(classes, 5000))
    labels[:40], predicted[:40] = 30, 60
    result = confusions(labels, predicted, classes, names_of(classes)) | {"class_names": names_of(classes)}
    assert len(json.dumps(result)) < 150_000  # a table has 1e6 cells
    top = result["top_confusions"]
    assert (len(top), top[0]["true_class"], top[0]["predicted_class"]) == (15, "class 30", "class 60")
    expected = confusion_matrix(labels, predicted)
    cells = result["confusion"]
    assert sum(cells["images"]) == 5000
    assert (expected[cells["true"], cells["predicted"]] == cells["images"]).all()

    table, of_class, names = shown_confusions(result)
    places = [int(name.removeprefix("class ")) // 3 for name in names]
    np.testing.assert_array_equal(table, expected[np.ix_(places, places)])
    np.testing.assert_array_equal(of_class, expected.sum(1)[places])
    assert len(names) == 30 and {"class 30", "class 60"} <= set(names)
    dense = shown_confusions(result | {"confusion": expected.tolist()})  # as an earlier version wrote it
    np.testing.assert_array_equal(dense[0], table)
    draw_confusion(result, tmp_path / "many.png")
    assert Image.open(tmp_path / "many.png").size[0] > 500
