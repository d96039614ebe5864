"""The common style of all figures: matplotlib without a display, one size, one set of colors."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.common.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

ACCENT = "#1f5fa8"
BASELINES = ("#c2571a", "#777777", "#3b8a4e")
DOTS_PER_INCH = 160


def new_figure(width: float = 7.0, height: float = 3.8) -> "tuple[Figure, Axes]":
    """A figure of the given size in inches with one pair of axes, a light grid and no box."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(True, color="#e3e3e3", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes a PNG atomically."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DOTS_PER_INCH)


def draw_or_log(draw: Callable[[dict[str, Any], Path], None], result: dict[str, Any], path: Path) -> None:
    """Draws a result. An error is logged with its traceback: a figure must not cost a measurement."""
    try:
        draw(result, path)
    except Exception:
        path.unlink(missing_ok=True)  # one of an earlier result
        logger.warning(f"{path} can't be drawn; the numbers are complete", exc_info=True)


def label_line(axes: "Axes", height: float, words: str, color: str) -> None:
    """Draws a dashed horizontal line with a label above its right end."""
    axes.axhline(height, color=color, linestyle="--", linewidth=1.1)
    axes.annotate(
        words, (1, height), (-4, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
        ha="right", color=color, fontsize=9,
    )  # fmt: skip


def draw_by_layer(result: dict[str, Any], path: Path) -> None:
    """Draws a probe's accuracy by layer in percent, with its baselines, on the validation images.

    result: of linear_probe or knn. A bar over the `concatenated` layers, if any, shows their accuracy.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_figure()
    accuracy = 100 * np.asarray(result["valid_accuracy_by_layer"])  # (L+1,)
    layers, best = np.arange(len(accuracy)), result["best_layer"]
    axes.plot(layers, accuracy, "-o", color=ACCENT, markersize=4, label="features of the model")
    axes.plot(best, accuracy[best], "o", markersize=11, markerfacecolor="none", markeredgecolor=ACCENT)
    if "concatenated" in result:
        concatenated = result["concatenated"]
        height, count = 100 * concatenated["valid_accuracy"], len(concatenated["layers"])
        axes.plot(
            [concatenated["layers"][0], concatenated["layers"][-1]], [height, height],
            color=BASELINES[2], linewidth=3, alpha=0.8, label=f"{count} concatenated layers",
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
