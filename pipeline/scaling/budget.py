"""The compute-optimal model and number of images for a budget of FLOPs or GPU-hours.

Candidates are real models: integer layers and a width that its heads divide. Their widths follow the runs' (a straight
line of log width over log parameters), so the family keeps the proportions that the law was fitted on. FLOPs are
counted with attention and head (pipeline/costs.py). GPU-hours are those of the fastest layout that fits, by the
simulator of `plan`. Between candidates the cost of an image is interpolated; each size gets as many images as the
budget pays, and the one of the lowest loss is the optimum.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from pipeline import costs
from pipeline.config import ModelConfig, TrainConfig
from pipeline.scaling.bootstrap import Fitted, Interval, interval_of
from pipeline.scaling.law import Law
from pipeline.scaling.runs import Run

if TYPE_CHECKING:
    from pipeline.plan.layouts import Cluster, Layout

BELOW, ABOVE, CANDIDATES = 10.0, 1e4, 120
"""Candidates have from a tenth of the smallest run's parameters to 10,000 times the largest's."""
SIZES, DEGREE = 4000, 3
"""Sizes that are compared, and the degree of the polynomial of log cost over log parameters."""


@dataclass(frozen=True)
class Candidate:
    """A model of the family."""

    model: ModelConfig
    parameters: int
    cost: float
    """Of an image: FLOPs, or GPU-seconds."""


@dataclass(frozen=True)
class Optimum:
    """The compute-optimal training for a budget."""

    budget: float
    """FLOPs, or GPU-hours."""
    unit: str
    parameters: Interval
    images: Interval
    loss: Interval
    """Of the law, nats per token: without the noise of a run."""
    nearest: Candidate
    nearest_images: float
    """What the budget pays of the nearest candidate."""
    at_end: bool
    """Whether the largest or smallest size is the best: the optimum may lie beyond."""
    training: str = ""
    """For GPU-hours: batch, precision and layout of the nearest candidate."""


class Family:
    """Candidates by size, and the cost of an image at sizes between them."""

    def __init__(self, candidates: Sequence[Candidate], smooth: bool) -> None:
        """smooth: whether a polynomial evens out the steps of integer layers and widths; else the costs are exact."""
        self.candidates = candidates
        own = np.log([candidate.parameters for candidate in candidates])
        costs_ = np.log([candidate.cost for candidate in candidates])
        sizes = np.linspace(own[0], own[-1], SIZES)
        even = np.polyfit(own, costs_, min(DEGREE, len(candidates) - 1)) if smooth else None
        self.parameters = np.exp(sizes)
        """Sizes that are compared: float64 (SIZES,)."""
        self.cost = np.exp(np.interp(sizes, own, costs_) if even is None else np.polyval(even, sizes))
        """Of an image, FLOPs or GPU-seconds: float64 (SIZES,)."""

    def best(self, law: Law, budget: float) -> tuple[int, float]:
        """The place of the size with the lowest loss, and that loss. budget: FLOPs or GPU-seconds."""
        losses = law.loss(self.parameters, budget / self.cost)
        place = int(losses.argmin())
        return place, float(losses[place])

    def nearest(self, parameters: float) -> Candidate:
        """The candidate of about this size."""
        return min(self.candidates, key=lambda candidate: abs(np.log(candidate.parameters / parameters)))


def family(runs: Sequence[Run], cost: Callable[[ModelConfig, Run], float | None], smooth: bool) -> Family | None:
    """Models like the runs' at other sizes; None if none can be trained.

    cost: of an image in training; None if the model can't be trained. smooth: as in Family.
    """
    from pipeline.model.gpt_config import gpt2_config

    sizes = {run.parameters: run.model.shape.width for run in runs}
    logs = np.log(list(sizes)), np.log(list(sizes.values()))
    slope, offset = np.polyfit(*logs, 1)
    largest = max(runs, key=lambda run: run.parameters)
    found: dict[tuple[int, int], Candidate] = {}
    for parameters in np.geomspace(min(sizes) / BELOW, max(sizes) * ABOVE, CANDIDATES):
        layers, width = _shape(parameters, float(np.exp(offset + slope * np.log(parameters))), largest)
        if (layers, width) not in found:
            heads = max(1, width // 64)
            model = replace(largest.model, size=None, layers=layers, width=width, heads=heads)
            price = cost(model, largest)
            if price is not None:
                shape = gpt2_config(model, largest.shape.colors, largest.objective)
                found[layers, width] = Candidate(model, costs.parameter_count(shape), price)
    return Family(sorted(found.values(), key=lambda candidate: candidate.parameters), smooth) if found else None


def _shape(parameters: float, width: float, run: Run) -> tuple[int, int]:
    """Layers and a round width of a model with about so many parameters."""
    unit = 8 if width < 96 else 16 if width < 256 else 64
    width = max(1, round(width / unit)) * unit
    heads = max(1, width // 64)
    width = -(-width // heads) * heads
    outer = (2 * run.shape.colors + 1 + run.shape.n_positions) * width
    return max(1, round((parameters - outer) / (12 * width**2))), width


def flops_of(model: ModelConfig, run: Run) -> float:
    """Training FLOPs of an image."""
    from pipeline.model.gpt_config import gpt2_config

    shape = gpt2_config(model, run.shape.colors, run.objective)
    return costs.flops_per_token(shape) * shape.n_positions


def gpu_seconds_of(config: TrainConfig, cluster: "Cluster") -> Callable[[ModelConfig, Run], float | None]:
    """A function for the GPU-seconds of an image, in the fastest layout that fits the accelerators' memory.

    config: batch and precision of the training.
    """

    def seconds(model: ModelConfig, run: Run) -> float | None:
        layout = fastest_layout(config, cluster, model, run)
        return None if layout is None else layout.seconds * cluster.ranks / config.batch.global_size

    return seconds


def fastest_layout(config: TrainConfig, cluster: "Cluster", model: ModelConfig, run: Run) -> "Layout | None":
    """The fastest layout that fits; None if none does. run: one of the fit, for its colors and objective."""
    from pipeline.model.gpt_config import gpt2_config
    from pipeline.plan.layouts import alternatives, fits

    shape = gpt2_config(model, run.shape.colors, run.objective)
    with suppress(ValueError):  # a width that fp8 can't have
        layouts = alternatives(replace(config, model=model), shape, cluster)
        return min((one for one in layouts if fits(one, cluster)), key=lambda one: one.seconds, default=None)
    return None


def optimum(fitted: Fitted, sizes: Family, budget: float, unit: str) -> Optimum:
    """The size and number of images of the lowest loss that the budget (FLOPs, or GPU-hours) pays.

    The intervals are over the optima of the law's resamples.
    """
    total = budget * (3600 if unit == "GPU-hours" else 1)
    (chosen, loss), others = sizes.best(fitted.law, total), [sizes.best(law, total) for law in fitted.resamples]
    parameters, images, places = (
        sizes.parameters,
        total / sizes.cost,
        np.array([place for place, _ in others], dtype=int),
    )
    nearest = sizes.nearest(parameters[chosen])
    return Optimum(
        budget, unit,
        interval_of(float(parameters[chosen]), parameters[places]),
        interval_of(float(images[chosen]), images[places]),
        interval_of(loss, [other for _, other in others]),
        nearest, total / nearest.cost, chosen in (0, len(parameters) - 1),
    )  # fmt: skip
