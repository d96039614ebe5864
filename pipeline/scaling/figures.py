"""The figures of a scaling law, in the style of all figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.results.figures import new_figure, save_figure
from pipeline.scaling.accuracy import Probed
from pipeline.scaling.budget import Family
from pipeline.scaling.law import Law
from pipeline.scaling.runs import Selected

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTH = 100
"""Points of a drawn curve."""
BUDGETS = 5
"""Curves of the isoFLOP figure."""
SPREAD = 2.5
"""How far from its minimum a curve is drawn, in log of parameters."""
ENVELOPE = "#111111"


def size_colors(parameters: Sequence[int]) -> dict[int, tuple[float, ...]]:
    """A color for each size, from dark (small) to light."""
    from matplotlib import colormaps

    sizes = sorted(set(parameters))
    return {size: colormaps["viridis"](0.9 * place / max(1, len(sizes) - 1)) for place, size in enumerate(sizes)}


def short(count: float) -> str:
    """12345678 as "12.3M"."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:.3g}"


def draw_loss_by_flops(selected: Selected, law: Law, sizes: Family, path: Path) -> None:
    """Losses and the law's curve of each size against training FLOPs, with the envelope over all sizes."""
    figure, axes = new_figure()
    flops = selected.flops()
    _draw_sizes(axes, selected, law, flops)
    budgets = np.geomspace(flops.min(), 10 * flops.max(), SMOOTH)
    best = [sizes.best(law, budget)[1] for budget in budgets]
    axes.plot(budgets, best, "--", color=ENVELOPE, linewidth=1.2, label="compute-optimal")
    axes.set(xlabel="training FLOPs", ylabel="validation loss (nats per token)", xscale="log")
    axes.legend(frameon=False, fontsize=8, ncols=2)
    save_figure(figure, path)


def draw_loss_by_images(selected: Selected, law: Law, path: Path) -> None:
    """Losses against images seen: a line a size, and the law's curve."""
    figure, axes = new_figure()
    _draw_sizes(axes, selected, law, selected.points.images)
    axes.set(xlabel="images seen", ylabel="validation loss (nats per token)", xscale="log")
    axes.legend(frameon=False, fontsize=8, ncols=2)
    save_figure(figure, path)


def _draw_sizes(axes: "Axes", selected: Selected, law: Law, over: np.ndarray) -> None:
    """The points of each size, and its curve over their range. over: the horizontal place of each point."""
    points = selected.points
    for size, color in size_colors([int(size) for size in points.parameters]).items():
        own = points.parameters == size
        axes.plot(over[own], points.losses[own], "o", color=color, markersize=3.5, label=short(size))
        images = np.geomspace(points.images[own].min(), points.images[own].max(), SMOOTH)
        each = over[own][0] / points.images[own][0]
        axes.plot(images * each, law.loss(size, images), color=color, linewidth=1)


def draw_isoflops(selected: Selected, law: Law, sizes: Family, path: Path) -> None:
    """The law's loss against model size at equal FLOPs, with the minimum of each curve."""
    figure, axes = new_figure()
    flops = selected.flops()
    best = {budget: sizes.best(law, budget) for budget in np.geomspace(flops.min(), flops.max(), SMOOTH)}
    inner = [budget for budget in best if 0 < best[budget][0] < len(sizes.parameters) - 1] or list(best)
    budgets = [inner[place] for place in np.linspace(0, len(inner) - 1, BUDGETS).astype(int)]
    colors, minima = size_colors([*range(BUDGETS)]), [sizes.parameters[best[budget][0]] for budget in budgets]
    for number, budget in enumerate(budgets):
        near = np.abs(np.log(sizes.parameters / minima[number])) < SPREAD
        losses = law.loss(sizes.parameters[near], budget / sizes.cost[near])
        axes.plot(sizes.parameters[near], losses, color=colors[number], linewidth=1.2, label=f"{budget:.1e} FLOP")
    lowest = [best[budget][1] for budget in budgets]
    axes.plot(minima, lowest, "v--", color=ENVELOPE, markersize=6, linewidth=1, label="minimum")
    axes.set(xlabel="parameters", ylabel="loss of the law (nats per token)", xscale="log")
    axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def draw_accuracy(accuracies: Sequence[Probed], path: Path) -> None:
    """Accuracy in percent against validation loss, a line a run, a color a size; squares are results of `evaluate`."""
    figure, axes = new_figure()
    colors = size_colors([one.parameters for one in accuracies])
    for size, color in colors.items():
        axes.plot([], [], "o-", color=color, markersize=4, linewidth=1, label=short(size))
    for name, source in dict.fromkeys((one.name, one.source) for one in accuracies):
        own = [one for one in accuracies if (one.name, one.source) == (name, source)]
        axes.plot(
            [one.valid_loss for one in own], [100 * one.accuracy for one in own],
            "o-" if source == "probe" else "s-", color=colors[own[0].parameters], markersize=4, linewidth=1,
        )  # fmt: skip
    axes.invert_xaxis()
    axes.set(xlabel="validation loss (nats per token; lower is to the right)", ylabel="accuracy (%)")
    axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)
