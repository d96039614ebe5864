"""The closed form against scikit-learn, and what is logged of probes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifier

from pipeline.probe_config import STRENGTHS
from pipeline.train.probe.report import figure, warning
from pipeline.train.probe.ridge import Ridge, Rows, score_layer

WIDTH = 12


def random_rows(images: int, seed: int, classes: int) -> Rows:
    """Features around a centre of each class, of which the later ones are rarer; not centred, of unequal scales."""
    random = np.random.default_rng(seed)
    labels = np.minimum(random.geometric(0.4, images), classes) * 3  # labels have gaps
    centres = np.random.default_rng(0).normal(size=(3 * classes + 1, WIDTH))
    features = (5 + centres[labels] + 2 * random.normal(size=(images, WIDTH))) * np.logspace(-2, 1, WIDTH)
    return Rows(features.astype(np.float32), labels.astype(np.int32))


def alpha(train: Rows, strength: float) -> float:
    """The strength in scikit-learn's units, from the weighted covariance."""
    _, classes, counts = np.unique(train.labels, return_inverse=True, return_counts=True)
    weights = len(classes) / (len(counts) * counts[classes])
    covariance = np.cov(train.features.T.astype(np.float64), aweights=weights, bias=True)
    return float(strength * len(classes) * np.trace(covariance) / WIDTH)


@pytest.mark.parametrize("classes", [2, 5])
def test_every_strength_predicts_as_scikit_learn(classes: int) -> None:
    train, held_out = random_rows(300, 1, classes), random_rows(500, 2, classes)
    found = Ridge(train, torch.device("cpu")).predict(held_out.features)
    for strength, predicted in zip(STRENGTHS, found, strict=True):
        reference = RidgeClassifier(alpha=alpha(train, strength), class_weight="balanced")
        reference.fit(train.features.astype(np.float64), train.labels)
        assert (predicted == reference.predict(held_out.features.astype(np.float64))).all(), strength
    unbalanced = RidgeClassifier(alpha=alpha(train, 1e-3)).fit(train.features.astype(np.float64), train.labels)
    assert (unbalanced.predict(held_out.features.astype(np.float64)) != found[STRENGTHS.index(1e-3)]).any()


def test_the_strength_is_chosen_on_other_images_than_the_accuracy_is_measured_on() -> None:
    train, choice, test = (random_rows(images, seed, 3) for images, seed in ((40, 1), (200, 2), (200, 3)))
    score, ridge = score_layer(train, choice, test, torch.device("cpu")), Ridge(train, torch.device("cpu"))
    by_strength = [(ridge.predict(part.features) == part.labels[None]).mean(axis=1) for part in (choice, test)]
    best = by_strength[0].argmax()
    assert score == (by_strength[0][best], by_strength[1][best], STRENGTHS[best])
    assert len(set(by_strength[0])) > 2


def test_features_that_are_not_finite_or_all_equal_do_not_end_a_run() -> None:
    train = random_rows(40, 1, 3)
    broken = train._replace(features=np.full_like(train.features, np.nan))
    assert np.isnan(score_layer(broken, train, train, torch.device("cpu")).test)
    constant = train._replace(features=np.ones_like(train.features))
    assert 0 < score_layer(constant, constant, constant, torch.device("cpu")).test < 1


def rows(*accuracies: float | None) -> list[dict]:
    """Probes in the order of their steps."""
    return [{"step": 10 * number, "probe_accuracy": accuracy} for number, accuracy in enumerate(accuracies)]


def test_a_warning_after_three_falls_in_a_row() -> None:
    found = warning(rows(0.3, 0.5, 0.41, 0.4, 0.3)[::-1], 100)
    assert found == (
        "the probe accuracy has fallen for 3 probes in a row, by more than 2 standard errors of 100 images: 50.0% at "
        "step 10, 41.0% at step 20, 40.0% at step 30, 30.0% at step 40"
    )
    for not_falling in ((0.5, 0.4, 0.3), (0.5, 0.4, 0.4, 0.3), (0.3, 0.4, 0.3, 0.2), (0.5, None, 0.3, 0.2)):
        assert warning(rows(*not_falling)[::-1], 100) is None


def test_falls_within_noise_give_no_warning_and_a_fall_gives_one() -> None:
    falling = rows(0.5, 0.49, 0.48, 0.47, 0.41, 0.3, 0.2)  # two standard errors of 500 images: 4.5 points
    warned = [warning(falling[:end][::-1], 500) is not None for end in range(1, len(falling) + 1)]
    assert warned == [False, False, False, False, True, False, False]
    assert warning(falling[:4][::-1], 50_000) is not None
    again = rows(0.5, 0.4, 0.3, 0.2, 0.1, 0.5, 0.4, 0.3, 0.2, 0.1)
    warned = [warning(again[:end][::-1], 500) is not None for end in range(1, len(again) + 1)]
    assert [number for number, found in enumerate(warned) if found] == [3, 8]


def test_the_figure_is_an_image(tmp_path: Path) -> None:
    row = {"step": 5, "probe_layer": 1, "probe_accuracy": 0.4, "probe_accuracy_by_layer": [0.3, 0.4, float("nan")]}
    image = figure(json.loads(json.dumps(row)))
    assert image.shape == (380, 700, 3)
    assert len(np.unique(image)) > 2
