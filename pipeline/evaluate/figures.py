"""The look that all figures share: matplotlib without a display, one size, one set of colours."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACCENT = "#1f5fa8"
BASELINES = ("#c2571a", "#777777", "#3b8a4e")
DOTS_PER_INCH = 160


def new_figure() -> "tuple[Figure, Axes]":
    """A figure of 7 x 3.8 inches with one pair of axes, light grid, no box."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(True, color="#e3e3e3", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes a PNG, whatever the file is called."""
    figure.savefig(path, format="png", dpi=DOTS_PER_INCH)


def label_line(axes: "Axes", height: float, words: str, color: str) -> None:
    """A dashed line across the figure with its name at the right end, above it."""
    axes.axhline(height, color=color, linestyle="--", linewidth=1.1)
    axes.annotate(
        words,
        xy=(1, height),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 3),
        textcoords="offset points",
        ha="right",
        color=color,
        fontsize=9,
    )
