"""The fit: against scipy's own Huber regression, and on losses of a known law."""

import numpy as np
import pytest
from scipy.optimize import least_squares

from pipeline.config import ModelConfig
from pipeline.scaling.bootstrap import fit_with_resamples
from pipeline.scaling.budget import Candidate, Family, optimum
from pipeline.scaling.law import DELTA, Law, Points, at_bound, fit
from tests.pipeline.scaling.synthetic import TRUE

MODEL = ModelConfig(layers=2, width=32, heads=1)
SIZES, IMAGES = np.geomspace(7e4, 2e7, 7), np.geomspace(1.3e4, 1.3e6, 5)


def grid(noise: float, seed: int = 0, sizes: np.ndarray = SIZES, images: np.ndarray = IMAGES) -> Points:
    """A run for each size and number of images, with errors of log L of this standard deviation."""
    parameters, seen = (each.ravel() for each in np.meshgrid(sizes, images))
    errors = noise * np.random.default_rng(seed).standard_normal(parameters.size)
    return Points(parameters, seen, TRUE.loss(parameters, seen) * np.exp(errors), np.arange(parameters.size))


def steps_of_runs(noise: float, offset: float, seed: int = 0) -> Points:
    """40 losses along a run of each size, and an error that all losses of a run share."""
    parameters, seen = np.meshgrid(SIZES, np.linspace(3e4, 1.3e6, 40), indexing="ij")
    random = np.random.default_rng(seed)
    errors = noise * random.standard_normal(seen.shape) + offset * random.standard_normal((len(SIZES), 1))
    losses, runs = TRUE.loss(parameters, seen) * np.exp(errors), np.repeat(np.arange(len(SIZES)), 40)
    return Points(parameters.ravel(), seen.ravel(), losses.ravel(), runs)


def numbers(law: Law) -> np.ndarray:
    return np.array([law.E, law.A, law.B, law.alpha, law.beta])


def assert_recovered(law: Law) -> None:
    assert abs(law.E / TRUE.E - 1) < 0.01
    assert abs(law.alpha - TRUE.alpha) < 0.03
    assert abs(law.beta - TRUE.beta) < 0.03


@pytest.mark.parametrize("points", [grid(0.001), steps_of_runs(0.002, 0.0005)], ids=["ends", "constant"])
def test_a_known_law_is_recovered(points: Points) -> None:
    assert_recovered(fit(points))


def test_without_noise_the_law_is_exact() -> None:
    assert numbers(fit(grid(0.0))) == pytest.approx(numbers(TRUE), rel=1e-3)


def test_the_fit_is_the_minimum_that_scipy_finds() -> None:
    """least_squares minimizes the same function with another method (trust region) and its own Huber loss."""
    points = grid(0.002, seed=3)

    def errors(values: np.ndarray) -> np.ndarray:
        law = Law(*np.exp(values[:3]), *values[3:])
        return np.log(law.loss(points.parameters, points.images)) - np.log(points.losses)

    start = np.array([*np.log([1.8, 20.0, 40.0]), 0.3, 0.3])
    scales = {"loss": "huber", "f_scale": DELTA, "x_scale": [0.1, 1, 1, 0.1, 0.1]}
    reference = least_squares(errors, start, xtol=1e-14, ftol=1e-14, gtol=1e-14, max_nfev=20000, **scales)
    own = fit(points)
    ours = least_squares(errors, [*np.log(numbers(own)[:3]), own.alpha, own.beta], max_nfev=1, **scales)
    assert ours.cost <= reference.cost * (1 + 1e-5)
    expected = np.array([*np.exp(reference.x[:3]), *reference.x[3:]])
    assert numbers(own) == pytest.approx(expected, rel=2e-3)


def test_an_outlier_hardly_moves_the_fit() -> None:
    points = grid(0.001)
    points.losses[17] *= 1.2
    assert_recovered(fit(points))


def test_numbers_at_the_bounds_of_the_search_are_named() -> None:
    points = grid(0.0)
    assert at_bound(TRUE, points) == []
    assert at_bound(Law(2.0, 1.0, 1.0, 0.01, 3.0), points) == ["B", "alpha", "beta"]
    assert at_bound(Law(2.0, 1e-9, 60.0, 0.28, 0.34), points) == ["A"], "the term is switched off"
    assert at_bound(Law(1e-5, 12.0, 60.0, 0.28, 0.34), points) == ["E"]


def test_fewer_than_ten_residuals_give_no_interval() -> None:
    points = grid(0.001, sizes=SIZES[::3], images=IMAGES[[0, 1, 2, 4]])
    assert len(points) == 12
    found = fit_with_resamples(points, 50)
    interval = found.interval(lambda law: law.E)
    assert (interval.low, interval.high) == (None, None) and interval.shown(str) == "no interval"
    assert found.prediction(1e7, 1e6).low is None
    assert (
        optimum(
            found, Family([Candidate(MODEL, 10**6, 1e9), Candidate(MODEL, 10**8, 1e11)], True), 1e16, "FLOP"
        ).loss.low
        is None
    )


def test_intervals_contain_the_truth_and_repeat_with_the_seed() -> None:
    points = grid(0.001, seed=1)
    first = fit_with_resamples(points, 50)
    assert fit_with_resamples(points, 3).resamples == first.resamples[:3]
    for name in ("E", "alpha", "beta"):
        interval = first.interval(lambda law, name=name: getattr(law, name))
        assert interval.low < getattr(TRUE, name) < interval.high
        assert interval.low < interval.value < interval.high
    prediction = first.prediction(1e8, 1e7)
    assert prediction.low < float(TRUE.loss(1e8, 1e7)) < prediction.high
    assert prediction.high - prediction.low > 1.5 * 0.001 * prediction.value, "the noise of a run is part of it"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ends", "constant"])
def test_95_percent_intervals_contain_the_truth_that_often(kind: str) -> None:
    held = []
    for seed in range(50):
        points = grid(0.002, seed) if kind == "ends" else steps_of_runs(0.002, 0.0, seed)
        fitted = fit_with_resamples(points, 200, seed)
        for name in ("E", "alpha", "beta"):
            interval = fitted.interval(lambda law, name=name: getattr(law, name))
            held.append(interval.low <= getattr(TRUE, name) <= interval.high)
    assert 0.88 <= np.mean(held) <= 1.0
