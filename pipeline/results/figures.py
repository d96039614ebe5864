"""The look that all figures share: matplotlib without a display, one size, one set of colors."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.common.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACCENT = "#1f5fa8"
BASELINES = ("#c2571a", "#777777", "#3b8a4e")
DOTS_PER_INCH = 160


def new_figure(width: float = 7.0, height: float = 3.8) -> "tuple[Figure, Axes]":
    """A figure of so many inches with one pair of axes, light grid, no box."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(True, color="#e3e3e3", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes a PNG, completely or not at all."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DOTS_PER_INCH)


def label_line(axes: "Axes", height: float, words: str, color: str) -> None:
    """A dashed line across the figure with its name at the right end, above it."""
    axes.axhline(height, color=color, linestyle="--", linewidth=1.1)
    axes.annotate(
        words, (1, height), (-4, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
        ha="right", color=color, fontsize=9,
    )  # fmt: skip


def draw_by_layer(result: dict[str, Any], path: Path) -> None:
    """Draws a probe's accuracy by layer in percent, with its baselines, all on the validation images.

    result: of linear_probe or knn; a bar shows the accuracy of `concatenated` layers, over those layers.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_figure()
    accuracy = 100 * np.asarray(result["valid_accuracy_by_layer"])  # (L+1,)
    layers, best = np.arange(len(accuracy)), result["best_layer"]
    axes.plot(layers, accuracy, "-o", color=ACCENT, markersize=4, label="features of the model")
    axes.plot(best, accuracy[best], "o", markersize=11, markerfacecolor="none", markeredgecolor=ACCENT)
    if "concatenated" in result:
        joined = result["concatenated"]
        height, count = 100 * joined["valid_accuracy"], len(joined["layers"])
        axes.plot(
            [joined["layers"][0], joined["layers"][-1]], [height, height],
            color=BASELINES[2], linewidth=3, alpha=0.8, label=f"{count} layers side by side",
        )  # fmt: skip
    for (name, words), color in zip(
        (("color_histogram", "color histogram"), ("raw_pixel", "raw pixels")), BASELINES[:2], strict=True
    ):
        value = 100 * result[f"{name}_valid_accuracy"]
        axes.axhline(value, color=color, linestyle="--", linewidth=1.2, label=words)
    axes.set_xlabel(f"layer (0 = input of the first block, {len(accuracy) - 1} = after the final norm)")
    axes.set_ylabel("validation accuracy (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(framealpha=0.9, edgecolor="none")
    save_figure(figure, path)
