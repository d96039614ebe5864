"""The linear classifiers against scikit-learn run directly and against SGD written out; the votes."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import mode
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from pipeline.evaluate.classifiers.logistic import LinearClassifier, fit_logistic, logistic_path, moments
from pipeline.evaluate.classifiers.sgd import Sgd, train_sgd
from pipeline.evaluate.features import labelled
from pipeline.evaluate.features.labelled import Labelled, color_histogram, concatenated, raw_pixels
from pipeline.evaluate.metrics.mask_ensemble import majority_vote
from pipeline.evaluate.options import SgdOptions
from tests.pipeline.evaluate.tiny_sets import random_images, random_palette

STRENGTHS = [1.0, 0.1, 0.01, 0.001]
CPU = torch.device("cpu")


def scikit_learn(train: Labelled, strength: float) -> Pipeline:
    classifier = LogisticRegression(C=1 / (strength * len(train.labels)), tol=1e-6, max_iter=5000)
    return make_pipeline(StandardScaler(), classifier).fit(np.asarray(train.features, np.float64), train.labels)


def blobs(classes: int = 4, count: int = 2400) -> tuple[Labelled, Labelled]:
    """Features of unlike scales and a constant one, of classes that overlap: 400 to train on, the rest to validate."""
    random = np.random.default_rng(0)
    centres = random.normal(size=(classes, 12))
    labels = 2 * random.integers(0, classes, count)  # 0, 2, 4 ...: not the numbers of rows
    features = (centres[labels // 2] + 1.5 * random.normal(size=(count, 12))) * np.logspace(-3, 3, 12) + 5
    features[:, 3] = 2.0
    features = features.astype(np.float32)
    return Labelled(features[:400], labels[:400]), Labelled(features[400:], labels[400:])


def at_once(_name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    return work()


@pytest.mark.parametrize("classes", [2, 4])
def test_the_probe_equals_scikit_learn(classes: int) -> None:
    train, valid = blobs(classes)
    for probe in logistic_path(train, STRENGTHS):
        reference = scikit_learn(train, probe.setting)
        assert probe.accuracy(valid) == pytest.approx(reference.score(*valid), abs=0.002)
        expected = log_loss(valid.labels, reference.predict_proba(valid.features))
        assert probe.losses(valid).mean() == pytest.approx(expected, rel=1e-2)
        assert probe.converged


def test_the_strength_is_the_best_on_validation() -> None:
    train, valid = blobs()
    fitted = fit_logistic(train, valid, STRENGTHS)
    scores = {strength: scikit_learn(train, strength).score(*valid) for strength in STRENGTHS}
    assert fitted["valid_accuracy"] == pytest.approx(max(scores.values()), abs=0.002)
    assert scores[fitted["setting"]] == pytest.approx(max(scores.values()), abs=0.002)
    assert LinearClassifier.of(fitted).accuracy(valid) == fitted["valid_accuracy"]


def test_of_equal_strengths_the_strongest_is_taken() -> None:
    data = Labelled(np.repeat([[-1.0], [1.0]], 20, axis=0).astype(np.float32), np.repeat([0, 1], 20))
    assert fit_logistic(data, data, [0.001, 1.0, 0.01])["setting"] == 1.0


def test_images_of_a_class_that_training_lacked_are_wrong_and_have_no_loss() -> None:
    train, valid = blobs()
    probe = next(logistic_path(train, [0.1]))
    labels = np.where(np.arange(len(valid.labels)) < 1000, 3, valid.labels)  # no training image has a 3
    assert probe.accuracy(Labelled(valid.features, labels)) == pytest.approx(
        (probe.predict(valid.features)[1000:] == valid.labels[1000:]).sum() / 2000
    )
    np.testing.assert_array_equal(probe.losses(Labelled(valid.features, labels)), probe.losses(valid)[1000:])


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    train, valid = blobs()
    full = next(logistic_path(train, [0.1]))
    monkeypatch.setattr(labelled, "ROWS_AT_ONCE", 37)
    mean, deviation = moments(train.features)
    exact = train.features.astype(np.float64)
    expected = exact.std(axis=0)
    expected[3] = 1.0  # the constant one
    np.testing.assert_allclose(mean, exact.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(deviation, expected, rtol=1e-6)
    halves = [Labelled(part, train.labels) for part in (train.features[:, :5], train.features[:, 5:])]
    parted = next(logistic_path(concatenated(halves), [0.1]))
    np.testing.assert_allclose(parted.weight, full.weight, atol=1e-3)
    np.testing.assert_array_equal(full.predict(valid.features), full.classes[full._scores(valid.features).argmax(1)])


def test_sgd_is_momentum_and_a_cosine_written_out() -> None:
    train, _ = blobs()
    probe = train_sgd(train, 0.3, 3, 64, np.random.default_rng(5), CPU)

    random = np.random.default_rng(5)
    features = train.features.astype(np.float64)
    inputs = (features - features.mean(0)) / np.where(features.std(0) == 0, 1, features.std(0))
    inputs = np.hstack([inputs, np.ones((400, 1))])  # the bias
    weight, speed, step = np.zeros((13, 4)), np.zeros((13, 4)), 0
    for _epoch in range(3):
        order = random.permutation(400)
        for start in range(0, 400, 64):
            rows = order[start : start + 64]
            scores = np.exp(inputs[rows] @ weight)
            gap = scores / scores.sum(1, keepdims=True) - np.eye(4)[train.labels[rows] // 2]
            speed = 0.9 * speed + inputs[rows].T @ gap / len(rows)
            weight -= 0.3 * (1 + math.cos(math.pi * step / 21)) / 2 * speed
            step += 1
    np.testing.assert_allclose(probe.weight, weight[:-1].T, atol=1e-4)
    np.testing.assert_allclose(probe.bias, weight[-1], atol=1e-4)
    np.testing.assert_array_equal(probe.classes, [0, 2, 4, 6])


def test_sgd_finds_what_scikit_learn_finds() -> None:
    """No weight decay: the optimum equals logistic regression with almost no weight decay."""
    train, valid = blobs()
    probe = train_sgd(train, 0.1, 150, 64, np.random.default_rng(0), CPU)
    reference = scikit_learn(train, 1e-6)
    assert probe.accuracy(valid) == pytest.approx(reference.score(*valid), abs=0.002)


def test_the_rate_is_searched_downward_until_the_loss_stops_falling(monkeypatch: pytest.MonkeyPatch) -> None:
    train, valid = blobs()
    losses = {30.0: math.inf, 10.0: math.inf, 3.0: 2.0, 1.0: 1.5, 0.3: 1.6, 0.1: 1.0}
    tried = []

    def fitted(
        _self: Sgd, _name: str, _train: Labelled, _valid: Labelled, rate: float, *_rest: object
    ) -> dict[str, float]:
        tried.append(rate)
        return {"setting": rate, "valid_loss": losses[rate]}

    with monkeypatch.context() as patched:
        patched.setattr(Sgd, "fit", fitted)
        best = Sgd(SgdOptions(rates=[3.0, *losses][::-1]), 0, CPU, at_once).search("x", train, valid)
    assert best["setting"] == 1.0
    assert tried == [30.0, 10.0, 3.0, 1.0, 0.3]

    solver = Sgd(SgdOptions(epochs=3), 0, CPU, at_once)  # as it is, nothing replaced
    found = solver.search("x", train, valid)
    assert 0.003 < found["setting"] < 30
    again = solver.fit("x", train, valid, found["setting"], 0)
    assert again["valid_loss"] == found["valid_loss"]
    other = solver.fit("x", train, valid, found["setting"], 1)
    assert not np.array_equal(other["weight"], again["weight"])  # another order of the images


def test_the_majority_wins_and_ties_are_broken_at_random() -> None:
    random = np.random.default_rng(0)
    votes = random.integers(0, 4, (5, 3000))
    voted = majority_vote(votes, np.random.default_rng(1))
    expected = mode(votes, axis=0)
    counts = (votes == voted).sum(0)
    np.testing.assert_array_equal(counts, expected.count)
    np.testing.assert_array_equal(voted, majority_vote(votes, np.random.default_rng(1)))
    tied = majority_vote(np.repeat([[7], [7], [2], [2], [5]], 4000, axis=1), np.random.default_rng(2))
    assert set(tied) == {2, 7}
    assert np.mean(tied == 2) == pytest.approx(0.5, abs=0.03)


def test_raw_pixels_are_the_palette_colors() -> None:
    tokens, palette = random_images(5, 0)[0], random_palette()
    pixels = raw_pixels(tokens, palette).reshape(5, -1, 3)
    for image in range(5):
        for position in range(tokens.shape[1]):
            np.testing.assert_array_equal(pixels[image, position], palette[tokens[image, position]])


def test_color_histogram_counts() -> None:
    tokens = random_images(5, 0)[0]
    histogram = color_histogram(tokens, 24)
    for image, row in zip(tokens, histogram, strict=True):
        np.testing.assert_allclose(row, [np.mean(image == color) for color in range(24)], rtol=1e-6)


@pytest.mark.parametrize("key", ["epochs", "batch_size", "seeds"])
def test_sgd_options_of_at_least_one_are_asked_for(key: str) -> None:
    with pytest.raises(ValueError, match=rf"linear_probe\.sgd\.{key} is 0; it must be at least 1"):
        SgdOptions(**{key: 0})


def test_rates_above_zero_are_asked_for() -> None:
    for rates in ([], [1.0, 0.0]):
        with pytest.raises(ValueError, match=r"sgd\.rates is .*; it must be a list of finite numbers above 0"):
            SgdOptions(rates=rates)
