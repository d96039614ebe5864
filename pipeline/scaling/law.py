"""The scaling law L(N, D) = E + A / N^alpha + B / D^beta: its fit, and intervals by a bootstrap.

Approach 3 of Hoffmann et al. 2022 ("Training Compute-Optimal Large Language Models", section 3.3 and D.2): the Huber
loss of log L with delta 1e-3 is minimized by L-BFGS from a grid of starts, and the best minimum is taken. N: all
parameters, D: images seen, L: nats per token.

N and D are divided by their geometric means, so that the five numbers of the search are of one size: exp(a) and exp(b)
are what the model's size and the images add to the loss at the middle of the data. The Huber loss is in units of
delta: its raw gradients, near 1e-6, end L-BFGS too early (Besiroglu et al. 2024, "Chinchilla Scaling: A replication
attempt").
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

DELTA = 1e-3
"""Residual of log L above which the Huber loss is linear."""
SHARES = (0.2, 0.5, 0.8, 0.95)
"""Starts: E as a fraction of the lowest loss."""
DIVISIONS = (0.15, 0.5, 0.85)
"""Starts: the fraction of the rest that is due to the model's size."""
EXPONENTS = (0.1, 0.3, 0.6, 1.0, 1.6)
"""Starts of alpha and of beta."""
MOST_STARTS, FEW_ITERATIONS, FINALISTS = 60, 50, 5
"""Of the 300 starts the 60 with the lowest losses get 50 iterations each, and the five best of these are finished."""
BOUNDS = ((-12.0, 4.0), (-12.0, 4.0), (-12.0, 4.0), (0.01, 3.0), (0.01, 3.0))
"""Of log A' and log B' (at the middle of the data), log E, alpha and beta; logs are relative to the mean loss."""
OFF = 1e-4
"""Fraction of the loss, at the middle of the data, below which a term of the law is as good as absent."""
PARAMETERS = 5
"""Numbers that are fitted."""


@dataclass(frozen=True)
class Points:
    """Losses of runs, one entry each: float64 (n,) and, for `runs`, int64 (n,)."""

    parameters: np.ndarray
    images: np.ndarray
    losses: np.ndarray
    """Nats per token."""
    runs: np.ndarray
    """Index of the run that a loss is of; errors within a run are taken as dependent."""

    def __len__(self) -> int:
        return len(self.losses)

    def where(self, chosen: np.ndarray) -> "Points":
        """The chosen points; bool (n,)."""
        return Points(self.parameters[chosen], self.images[chosen], self.losses[chosen], self.runs[chosen])


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta."""

    E: float
    """The loss of an unlimited model on unlimited images, nats per token."""
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: np.ndarray | float, images: np.ndarray | float) -> np.ndarray:
        """The loss in nats per token, broadcast over both arguments."""
        of_size, of_data = np.power(parameters, -self.alpha), np.power(images, -self.beta)
        return np.asarray(self.E + self.A * of_size + self.B * of_data)


class _Objective:
    """The Huber loss of log L and its gradient over (a, b, e, alpha, beta)."""

    def __init__(self, points: Points) -> None:
        self._log_parameters, self._log_images = np.log(points.parameters), np.log(points.images)
        self._middle = self._log_parameters.mean(), self._log_images.mean()
        self.size, self.data = self._log_parameters - self._middle[0], self._log_images - self._middle[1]
        self._scale = np.log(points.losses).mean()
        self.logs = np.log(points.losses) - self._scale

    def __call__(self, values: np.ndarray) -> tuple[float, np.ndarray]:
        """In units of delta squared: float, float64 (5,)."""
        a, b, e, alpha, beta = values
        terms = np.exp([a - alpha * self.size, b - beta * self.data, np.full_like(self.size, e)])  # (3, n)
        total = terms.sum(axis=0)
        residuals = (np.log(total) - self.logs) / DELTA
        clipped = np.clip(residuals, -1.0, 1.0)
        shares = clipped * terms / total / DELTA  # (3, n)
        gradient = [*shares.sum(axis=1), -(shares[0] @ self.size), -(shares[1] @ self.data)]
        return float((clipped * (residuals - 0.5 * clipped)).sum()), np.array(gradient)

    def law(self, values: np.ndarray) -> Law:
        a, b, e, alpha, beta = map(float, values)
        middle_size, middle_data = self._middle
        scale = self._scale
        return Law(
            float(np.exp(e + scale)),
            float(np.exp(a + scale + alpha * middle_size)),
            float(np.exp(b + scale + beta * middle_data)),
            alpha,
            beta,
        )

    def values(self, law: Law) -> np.ndarray:
        """The inverse of `law`."""
        middle_size, middle_data = self._middle
        a, b = np.log(law.A) - law.alpha * middle_size, np.log(law.B) - law.beta * middle_data
        return np.array([a - self._scale, b - self._scale, np.log(law.E) - self._scale, law.alpha, law.beta])

    def best_starts(self) -> list[np.ndarray]:
        """The MOST_STARTS of the grid with the lowest losses: float64 (5,) each."""
        lowest = np.exp(self.logs.min())
        grid = [
            np.array([np.log(rest * division), np.log(rest * (1 - division)), np.log(share * lowest), alpha, beta])
            for share, division, alpha, beta in product(SHARES, DIVISIONS, EXPONENTS, EXPONENTS)
            for rest in [1.0 - share * lowest]
        ]
        return sorted(grid, key=lambda start: self(start)[0])[:MOST_STARTS]


def fit(points: Points, starts: Sequence[Law] = ()) -> Law:
    """The law of the lowest Huber loss. starts: laws to start from instead of the grid."""
    objective = _Objective(points)
    first = [objective.values(law) for law in starts]
    if not first:
        tried = [_minimize(objective, start, FEW_ITERATIONS) for start in objective.best_starts()]
        first = [values for _, values in sorted(tried, key=lambda found: found[0])[:FINALISTS]]
    value, best = min((_minimize(objective, start) for start in first), key=lambda found: found[0])
    for _ in range(10):  # L-BFGS may end early where the Huber loss is all but linear; a new start continues
        improved, again = _minimize(objective, best)
        if improved > value - 1e-9 * abs(value):
            break
        value, best = improved, again
    return objective.law(best)


def _minimize(objective: _Objective, start: np.ndarray, iterations: int = 500) -> tuple[float, np.ndarray]:
    from scipy.optimize import minimize

    low, high = np.array(BOUNDS).T
    found = minimize(
        objective, np.clip(start, low, high), jac=True, method="L-BFGS-B", bounds=BOUNDS,
        options={"maxiter": iterations, "ftol": 1e-12, "gtol": 1e-8},
    )  # fmt: skip
    return float(found.fun), found.x


def at_bound(law: Law, points: Points) -> list[str]:
    """Names of the numbers that are at a bound of the search, or whose term is as good as absent from the losses.

    The data does not determine these. points: those of the fit.
    """
    values = dict(zip(("A", "B", "E", "alpha", "beta"), _Objective(points).values(law), strict=True))
    low, high = BOUNDS[3]
    exponents = [name for name in ("alpha", "beta") if not 1.01 * low < values[name] < 0.99 * high]
    return [name for name in ("E", "A", "B") if not np.log(OFF) < values[name] < BOUNDS[0][1] - 0.01] + exponents


def residuals(law: Law, points: Points) -> np.ndarray:
    """log of the loss measured over the loss of the law: float64 (n,)."""
    return np.log(points.losses) - np.log(law.loss(points.parameters, points.images))
