"""The linear probe as a task: what it measures against scikit-learn, and invalid input."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from data_prep.shards.reader import ShardSet, open_shard_set
from pipeline.evaluate.cache import clear_unfinished
from pipeline.evaluate.context import Evaluation
from pipeline.evaluate.features.pooled import pooled_features
from pipeline.evaluate.options import LinearProbeOptions, SgdOptions
from pipeline.evaluate.registry import options_type, task_class
from pipeline.evaluate.tasks.linear_probe import LinearProbe, layers_around
from tests.pipeline.evaluate.tiny_sets import random_images, random_palette, write_shard_set

STRENGTHS = [1.0, 0.1, 0.01, 0.001]


def reference(train: tuple, valid: tuple, strengths: list[float]) -> tuple[float, object]:
    """(accuracy on valid, pipeline) of the strength that does best, each fitted from zero."""
    fitted = []
    for strength in strengths:
        classifier = LogisticRegression(C=1 / (strength * len(train[1])), tol=1e-6, max_iter=5000)
        pipeline = make_pipeline(StandardScaler(), classifier).fit(*(np.asarray(part, np.float64) for part in train))
        fitted.append((pipeline.score(*valid), pipeline))
    return max(fitted, key=lambda pair: pair[0])


def features_and_labels(evaluation: Evaluation, draw: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """By split: features (L+1, N, D), labels (N,)."""
    images = {name: evaluation.images(name, labelled=True) for name in ("train", "valid", "test")}
    features = {name: pooled_features(evaluation, chosen, draw) for name, chosen in images.items()}
    return features, {name: chosen.labels for name, chosen in images.items()}


def test_the_task_measures_the_layer_that_did_best_on_validation(model_folder: Path, evaluation_of: Callable) -> None:
    evaluation = evaluation_of(model_folder)
    result = LinearProbe(LinearProbeOptions(l2=STRENGTHS, concatenate=3)).measure(evaluation)

    features, labels = features_and_labels(evaluation)
    expected = []
    for layer in range(4):
        data = {name: (features[name][layer], labels[name]) for name in features}
        accuracy, pipeline = reference(data["train"], data["valid"], STRENGTHS)
        expected.append((accuracy, pipeline.score(*data["test"])))
    np.testing.assert_allclose(result["valid_accuracy_by_layer"], [valid for valid, _ in expected], atol=1 / 110)
    assert result["best_layer"] == int(np.argmax(result["valid_accuracy_by_layer"]))
    assert result["test_accuracy"] == pytest.approx(expected[result["best_layer"]][1], abs=2 / 127)
    assert (result["classes"], result["train_images"], result["test_images"]) == (3, 323, 127)
    most_common = np.bincount(labels["train"]).argmax()
    assert result["majority_class_test_accuracy"] == pytest.approx(np.mean(labels["test"] == most_common))
    # Classes differ by color: the histogram is the best feature, and better than chance.
    assert result["color_histogram_test_accuracy"] > 0.5 > result["majority_class_test_accuracy"]

    together = result["concatenated"]
    assert together["layers"] == layers_around(result["best_layer"], 4, 3)
    assert together["features"] == 3 * 16
    wide = {name: np.concatenate([features[name][layer] for layer in together["layers"]], axis=1) for name in features}
    accuracy, pipeline = reference((wide["train"], labels["train"]), (wide["valid"], labels["valid"]), STRENGTHS)
    assert together["valid_accuracy"] == pytest.approx(accuracy, abs=1 / 110)
    assert together["test_accuracy"] == pytest.approx(pipeline.score(wide["test"], labels["test"]), abs=2 / 127)

    counts = np.bincount(labels["test"])
    assert result["images_by_class"]["test"] == counts.tolist()
    assert np.dot(result["test_accuracy_by_class"], counts) / 127 == pytest.approx(result["test_accuracy"])
    assert (evaluation.results / "linear_probe.png").read_bytes().startswith(b"\x89PNG")


def test_layers_around_the_best() -> None:
    assert layers_around(10, 25, 5) == [8, 9, 10, 11, 12]
    assert layers_around(1, 25, 5) == [0, 1, 2, 3, 4]
    assert layers_around(24, 25, 5) == [20, 21, 22, 23, 24]
    assert layers_around(2, 4, 5) == [0, 1, 2, 3]
    assert layers_around(3, 25, 0) == []


def test_labels_of_the_test_split_choose_nothing(
    model_folder: Path, evaluation_of: Callable, shards: ShardSet, tmp_path: Path
) -> None:
    splits = {
        "train": random_images(330, 1, unlabelled=7),
        "valid": random_images(110, 2),
        "test": random_images(130, 4),  # others
    }
    other = open_shard_set(write_shard_set(tmp_path / "other", splits, random_palette()))
    results = []
    for number, each in enumerate((shards, other)):
        evaluation = evaluation_of(model_folder, each, features=f"features-{number}")
        clear_unfinished(evaluation.results, "test")
        results.append(LinearProbe(LinearProbeOptions(l2=[0.1, 0.01])).measure(evaluation))
    first, second = results
    for key in ("valid_accuracy_by_layer", "best_layer", "best_l2", "raw_pixel_valid_accuracy"):
        assert first[key] == second[key], key
    assert first["concatenated"]["l2"] == second["concatenated"]["l2"]
    assert first["test_accuracy"] != second["test_accuracy"]


def test_sgd_gives_mean_and_deviation_over_seeds(model_folder: Path, evaluation_of: Callable) -> None:
    evaluation = evaluation_of(model_folder)
    sgd = SgdOptions(rates=[0.1, 0.01], epochs=20, batch_size=32, seeds=3)
    result = LinearProbe(LinearProbeOptions(solver="sgd", sgd=sgd, concatenate=2)).measure(evaluation)
    for probe in (result, result["concatenated"]):
        accuracies = probe["test_accuracy_by_seed"]
        assert len(accuracies) == 3
        assert not [key for key in probe if key.endswith("_interval")]  # a mean has none
        assert probe["test_accuracy"] == pytest.approx(np.mean(accuracies))
        assert probe["test_accuracy_deviation"] == pytest.approx(np.std(accuracies, ddof=1))
        assert probe["test_accuracy"] > result["majority_class_test_accuracy"] + 0.1
    assert result["best_rate"] in sgd.rates and result["concatenated"]["rate"] in sgd.rates
    features, labels = features_and_labels(evaluation)
    data = {name: (features[name][result["best_layer"]], labels[name]) for name in features}
    _, pipeline = reference(data["train"], data["valid"], [1e-4])
    assert result["test_accuracy"] == pytest.approx(pipeline.score(*data["test"]), abs=0.06)  # 8 of 127 images


def test_sgd_with_one_seed_has_no_others(
    model_folder: Path, evaluation_of: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    sgd = SgdOptions(rates=[0.1], epochs=1, batch_size=32, seeds=1)
    result = LinearProbe(LinearProbeOptions(solver="sgd", sgd=sgd)).measure(evaluation_of(model_folder))
    assert "other seeds" not in caplog.text
    assert "test_accuracy_deviation" not in result


def test_a_masked_model_votes_over_five_masks(masked_folder: Path, evaluation_of: Callable) -> None:
    evaluation = evaluation_of(masked_folder)
    result = LinearProbe(LinearProbeOptions(l2=[0.1], concatenate=0)).measure(evaluation)
    assert "concatenated" not in result
    features, labels = features_and_labels(evaluation)
    layer = result["best_layer"]
    _, pipeline = reference(
        (features["train"][layer], labels["train"]), (features["valid"][layer], labels["valid"]), [0.1]
    )
    looks = [features_and_labels(evaluation, draw)[0]["test"][layer] for draw in range(5)]
    predicted = np.stack([pipeline.predict(look) for look in looks])  # (5, N)
    by_mask = (predicted == labels["test"]).mean(1)
    np.testing.assert_allclose(result["test_accuracy_by_mask"], by_mask, atol=1.5 / 127)
    assert result["test_accuracy"] == result["test_accuracy_by_mask"][0]
    assert len(set(result["test_accuracy_by_mask"])) > 1
    votes = (predicted[:, :, None] == np.arange(3)).sum(0)  # (N, 3)
    decided = np.sort(votes)[:, -1] > np.sort(votes)[:, -2]
    right = (votes.argmax(1) == labels["test"])[decided].sum()
    assert right - 1 <= 127 * result["ensembled_test_accuracy"] <= right + (~decided).sum() + 1


def test_classes_that_a_split_lacks(
    model_folder: Path, evaluation_of: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Class 2 has no test image; class 1 is in test, but not in train."""
    data = {"train": random_images(200, 1), "valid": random_images(60, 2), "test": random_images(80, 3)}
    classes = {"train": [0, 2], "valid": [0, 1, 2], "test": [0, 1]}
    data = {name: tuple(part[np.isin(data[name][1], classes[name])] for part in data[name]) for name in data}
    other = open_shard_set(write_shard_set(tmp_path / "other", data, random_palette()))
    result = LinearProbe(LinearProbeOptions(l2=[0.1, 0.01])).measure(evaluation_of(model_folder, other))
    assert result["absent_classes"] == {"train": ["class 1"], "valid": [], "test": ["class 2"]}
    zero, one, two = result["test_accuracy_by_class"]
    assert zero > 0 and one == 0 and two is None
    counts = result["images_by_class"]["test"]
    assert result["test_accuracy"] == pytest.approx(zero * counts[0] / sum(counts))
    assert result["classes"] == 2
    printed = caplog.text
    assert "linear_probe: no labelled image in test of class 2" in printed
    assert "linear_probe: no labelled image in train of class 1" in printed


@pytest.mark.parametrize("task", ["linear_probe", "knn", "low_data"])
@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": 60, "valid": 20}, r"has no split 'test'; it has train, valid"),
        ({"train": 60, "valid": 20, "test": -20}, r"has no labelled images in its split test"),
        ({"train": -60, "valid": 20, "test": 20}, r"has no labelled images in its split train"),
        ({"train": 1, "valid": 20, "test": 20}, r"has a single class in train; TASK needs at least two"),
    ],
)
def test_splits_that_cannot_be_probed(
    task: str, splits: dict[str, int], message: str, model_folder: Path, evaluation_of: Callable, tmp_path: Path
) -> None:
    data = {name: random_images(abs(n), seed=9, unlabelled=max(-n, 0)) for name, n in splits.items()}
    other: ShardSet = open_shard_set(write_shard_set(tmp_path / "other", data, random_palette()))
    evaluation = evaluation_of(model_folder, other)
    with pytest.raises(ValueError, match=message.replace("TASK", task)):
        task_class(task)(options_type(task)()).measure(evaluation)
    assert not evaluation.features.exists()  # reported before any forward pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"l2": [0.0]}, r"linear_probe\.l2 is \[0\.0\]"),
        ({"concatenate": 1}, r"linear_probe\.concatenate is 1; it must"),
    ],
)
def test_invalid_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearProbeOptions(**options)
