"""Intervals of a law by a residual bootstrap over runs.

The law is fitted again and again to losses that it could have been measured with: its own, times the residuals of runs
drawn at random. The residuals of a run stay together, because those of neighboring steps are alike, and their sign is
drawn once for the run. Parameters and images stay as they are, so no resample lacks a size that the fit needs.

A Huber loss of so small a delta is almost a sum of absolute values, and its minimum passes through five points, as many
as numbers are fitted. The five residuals nearest to 0 are therefore not drawn: with them, intervals are too narrow
(McKean and Schrader 1987, "Least absolute errors analysis of variance"). If fewer than ten others are left, there are
no intervals: resamples of so few residuals say nothing of the law's error.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.scaling.law import PARAMETERS, Law, Points, fit, residuals

RESAMPLES = 200
CONFIDENCE = 0.95
FEWEST = 10
"""Residuals to draw from, without which there are no intervals."""


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its 95% interval."""

    value: float
    low: float | None
    """None, as `high`, if there are too few points for intervals."""
    high: float | None

    def shown(self, form: Callable[[float], str]) -> str:
        """ "3.1 to 3.4", or "no interval"; form: of a number."""
        return "no interval" if self.low is None or self.high is None else f"{form(self.low)} to {form(self.high)}"


@dataclass(frozen=True)
class Fitted:
    """A law with those of its resamples."""

    law: Law
    resamples: list[Law]
    """Empty if there are too few points for intervals."""
    noise: np.ndarray
    """The residuals of log L that are drawn: float64 (n - 5,)."""

    def interval(self, of: Callable[[Law], float]) -> Interval:
        """A number that follows from the law, such as one of its exponents."""
        return interval_of(of(self.law), [of(law) for law in self.resamples])

    def prediction(self, parameters: float, images: float) -> Interval:
        """The loss that a run will measure, nats per token: its noise is part of the interval."""
        drawn = np.random.default_rng(0).choice(self.noise, len(self.resamples))
        signs = np.random.default_rng(1).choice([-1.0, 1.0], len(self.resamples))
        losses = [float(law.loss(parameters, images)) for law in self.resamples]
        return interval_of(float(self.law.loss(parameters, images)), np.array(losses) * np.exp(signs * drawn))


def interval_of(value: float, resampled: Sequence[float] | np.ndarray) -> Interval:
    """The middle 95% of the resampled values; without any, no interval."""
    if not len(resampled):
        return Interval(value, None, None)
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(value, float(low), float(high))


def fit_with_resamples(points: Points, count: int = RESAMPLES, seed: int = 0) -> Fitted:
    """Fits the law, and `count` resamples of it; the same seed gives the same resamples.

    No resamples for fewer than FEWEST residuals that can be drawn.
    """
    law, generator = fit(points), np.random.default_rng(seed)
    errors, expected = residuals(law, points), law.loss(points.parameters, points.images)
    drawable = np.ones(len(points), dtype=bool)
    drawable[np.argsort(np.abs(errors))[:PARAMETERS]] = False
    of_run = [points.runs == run for run in np.unique(points.runs)]
    pool = [errors[own & drawable] for own in of_run if (own & drawable).any()]
    laws: list[Law] = []
    for _ in range(count if drawable.sum() >= FEWEST else 0):
        drawn = np.empty(len(points))
        for own in of_run:
            other, places = pool[generator.integers(len(pool))], np.arange(own.sum())
            drawn[own] = generator.choice([-1.0, 1.0]) * other[places * len(other) // len(places)]
        laws.append(fit(replace(points, losses=expected * np.exp(drawn)), [law]))
    return Fitted(law, laws, errors[drawable])
