"""The probe against scikit-learn run directly; what it measures and refuses."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tiny_sets import random_palette, random_pictures, write_shard_set

from data_prep.shards import ShardSet, open_shard_set
from pipeline.evaluate import linear_probe
from pipeline.evaluate.features import pooled_features
from pipeline.evaluate.linear_probe import Options, color_histogram, fit_probe, measure, raw_pixels

STRENGTHS = [1.0, 0.1, 0.01, 0.001]


def reference(train: tuple, valid: tuple, strengths: list[float]) -> tuple[float, object]:
    """(accuracy on valid, pipeline) of the strength that does best, each fitted from zero."""
    fitted = []
    for strength in strengths:
        classifier = LogisticRegression(C=1 / (strength * len(train[1])), tol=1e-6, max_iter=5000)
        pipeline = make_pipeline(StandardScaler(), classifier).fit(*(np.asarray(part, np.float64) for part in train))
        fitted.append((pipeline.score(*valid), pipeline))
    return max(fitted, key=lambda pair: pair[0])


@pytest.fixture
def blobs() -> tuple[tuple, tuple]:
    """Features of unlike scales and a constant one, of four classes that overlap; for training and validation."""
    random = np.random.default_rng(0)
    centres = random.normal(size=(4, 12))
    labels = random.integers(0, 4, 700)
    features = (centres[labels] + 1.5 * random.normal(size=(700, 12))) * np.logspace(-3, 3, 12) + 5
    features[:, 3] = 2.0
    features = features.astype(np.float32)
    return (features[:400], labels[:400]), (features[400:], labels[400:])


def test_probe_equals_scikit_learn(blobs: tuple) -> None:
    train, valid = blobs
    probe = fit_probe(train, valid, STRENGTHS)
    accuracy, pipeline = reference(train, valid, STRENGTHS)
    assert probe.valid_accuracy == pytest.approx(accuracy, abs=1 / 300)
    same = probe.classifier.predict(probe._standardise(valid[0])) == pipeline.predict(valid[0])
    assert same.mean() >= 0.99
    assert probe.accuracy(*valid) == probe.valid_accuracy
    assert probe.converged


def test_of_equal_strengths_the_strongest_is_taken() -> None:
    features = np.repeat([[-1.0], [1.0]], 20, axis=0).astype(np.float32)
    data = features, np.repeat([0, 1], 20)
    assert fit_probe(data, data, [0.001, 1.0, 0.01]).l2 == 1.0


def test_raw_pixels_are_the_palette_colours() -> None:
    tokens, palette = random_pictures(5, 0)[0], random_palette()
    pixels = raw_pixels(tokens, palette).reshape(5, -1, 3)
    for picture in range(5):
        for position in range(tokens.shape[1]):
            np.testing.assert_array_equal(pixels[picture, position], palette[tokens[picture, position]])


def test_color_histogram_counts() -> None:
    tokens = random_pictures(5, 0)[0]
    histogram = color_histogram(tokens, 24)
    for picture, row in zip(tokens, histogram, strict=True):
        np.testing.assert_allclose(row, [np.mean(picture == color) for color in range(24)], rtol=1e-6)


def test_the_task_measures_the_layer_that_did_best_on_validation(
    model_folder: Path, evaluation_of: Callable, tmp_path: Path
) -> None:
    evaluation = evaluation_of(model_folder)
    result = measure(evaluation, Options(l2=STRENGTHS))

    pictures = {name: evaluation.pictures(name, labelled=True) for name in ("train", "valid", "test")}
    features = {name: pooled_features(evaluation, pictures[name]) for name in pictures}
    expected = []
    for layer in range(4):
        data = {name: (features[name][layer], pictures[name].labels) for name in pictures}
        accuracy, pipeline = reference(data["train"], data["valid"], STRENGTHS)
        expected.append((accuracy, pipeline.score(*data["test"])))
    np.testing.assert_allclose(result["valid_accuracy_by_layer"], [valid for valid, _ in expected], atol=1 / 110)
    assert result["best_layer"] == int(np.argmax(result["valid_accuracy_by_layer"]))
    assert result["test_accuracy"] == pytest.approx(expected[result["best_layer"]][1], abs=2 / 127)
    assert (result["classes"], result["train_images"], result["test_images"]) == (3, 323, 127)
    labels = pictures["test"].labels
    commonest = np.bincount(pictures["train"].labels).argmax()
    assert result["majority_class_test_accuracy"] == pytest.approx(np.mean(labels == commonest))
    # Classes differ by colour: the histogram says most, and more than chance is known.
    assert result["color_histogram_test_accuracy"] > 0.5 > result["majority_class_test_accuracy"]
    assert (evaluation.results / "linear_probe.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in evaluation.results.iterdir()] == ["linear_probe.png"]  # the features are gone


def test_test_pictures_are_used_once_for_each_probe(
    model_folder: Path, evaluation_of: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test split meets the chosen layer and the two baselines, nothing else."""
    evaluation = evaluation_of(model_folder)
    sizes = []
    accuracy = linear_probe.Probe.accuracy

    def counted(probe: linear_probe.Probe, features: np.ndarray, labels: np.ndarray) -> float:
        sizes.append(len(labels))
        return accuracy(probe, features, labels)

    monkeypatch.setattr(linear_probe.Probe, "accuracy", counted)
    measure(evaluation, Options(l2=[0.1, 0.01]))
    assert sizes.count(127) == 3
    assert sizes.count(110) == 2 * 6


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": 60, "valid": 20}, r"has no split 'test'; it has train, valid"),
        ({"train": 60, "valid": 20, "test": -20}, r"has no labelled pictures in its split test"),
        ({"train": 1, "valid": 20, "test": 20}, r"has one class in train"),
    ],
)
def test_splits_that_cannot_be_probed(
    splits: dict[str, int], message: str, model_folder: Path, evaluation_of: Callable, tmp_path: Path
) -> None:
    data = {name: random_pictures(abs(n), seed=9, unlabelled=max(-n, 0)) for name, n in splits.items()}
    other: ShardSet = open_shard_set(write_shard_set(tmp_path / "other", data, random_palette()))
    with pytest.raises(ValueError, match=message):
        measure(evaluation_of(model_folder, other), Options())


def test_strengths_above_zero_are_asked_for() -> None:
    with pytest.raises(ValueError, match=r"linear_probe\.l2"):
        Options(l2=[0.0])
