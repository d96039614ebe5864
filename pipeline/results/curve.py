"""The training curve of a report, drawn from a run's metrics.jsonl."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.checkpoint.metrics_log import Row
from pipeline.checkpoint.metrics_table import MetricsTable
from pipeline.results.figures import ACCENT, BASELINES, label_line, new_figure, save_figure

CURVE = "training.png"
"""The file of the training curve in a results folder."""
CURVE_POINTS = 120


def has_losses(table: MetricsTable) -> bool:
    """Whether the rows have a training loss to draw."""
    return bool(len(table.losses))


VALID_LOSSES = {"raw": "valid_loss", "ema": "valid_loss_ema"}
"""Keys of the validation loss of the weights, and of their moving average."""


def valid_loss_at(table: MetricsTable, step: int | None, weights: str = "raw") -> float | None:
    """The validation loss that the run logged at a step, nats per token; None if there is none or it is NaN or Inf."""
    key = VALID_LOSSES[weights]
    found = [row[key] for row in _with(table, key) if row["step"] == step]
    return found[-1] if found else None


def _with(table: MetricsTable, key: str) -> list[Row]:
    """The validations with a number under this key; null stands for NaN or Inf."""
    return [row for row in table.others if row.get(key) is not None]


def draw_curve(table: MetricsTable, colors: int, density: dict[str, Any] | None, path: Path) -> None:
    """Draws the losses in metrics.jsonl over the images seen; density: its result, if measured, for the baselines."""
    images, low, mean, high = summarized(table)
    figure, axes = new_figure()
    axes.fill_between(images, low, high, color=ACCENT, alpha=0.18, linewidth=0)
    axes.plot(images, mean, color=ACCENT, linewidth=1.6, label="training")
    for key, style, label in (("valid_loss", "o-", "validation"), ("valid_loss_ema", "s--", "validation, EMA")):
        if validation := _with(table, key):
            axes.plot(
                [row["images"] for row in validation], [row[key] for row in validation],
                style, color="#111111", markersize=4, linewidth=1, label=label,
            )  # fmt: skip
    compared = density if density and not density.get("masked") else None  # a masked model sees other pixels
    label_line(axes, compared["uniform_nats_per_color"] if compared else math.log(colors), "uniform", BASELINES[1])
    if compared:
        label_line(axes, compared["unigram_nats_per_color"], "color frequencies", BASELINES[0])
        label_line(axes, compared["bigram_nats_per_color"], "previous color", BASELINES[2])
    axes.set(xlabel="images seen", ylabel="loss (nats per color)")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlim(left=0)
    axes.legend(frameon=False, loc="center right")
    save_figure(figure, path)


def describe_curve(table: MetricsTable, density: dict[str, Any] | None) -> tuple[str, str]:
    """The alternative text and the caption of the figure."""
    losses, validation, averaged = table.losses, _with(table, "valid_loss"), _with(table, "valid_loss_ema")
    alternative = (
        f"Line chart of the loss over the images seen: from {losses[0, 1]:.3f} to {losses[-1, 1]:.3f} nats per color "
        f"in training after {losses[-1, 0]:,.0f} images"
    )
    caption = "Loss on the training split (mean and range of consecutive steps)"
    if validation:
        alternative += f", {validation[-1]['valid_loss']:.3f} on the validation split"
        caption += " and on the validation split"
    if averaged:
        alternative += f" ({averaged[-1]['valid_loss_ema']:.3f} with the moving average of the weights)"
        caption += ", there also with the moving average of the weights (EMA)"
    lines = (
        f"Below a dashed line the model is better than this baseline, as measured on {density['split']}."
        if density and not density.get("masked")
        else "The dashed line is the loss of a uniform guess."
    )
    return f"{alternative}.", f"{caption}; lower is better. {lines}"


def summarized(table: MetricsTable) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images seen, and minimum, mean and maximum loss, for at most CURVE_POINTS groups of consecutive steps.

    Steps without a finite loss are excluded.
    """
    finite = table.losses  # (steps, 2)
    groups = np.array_split(finite, min(CURVE_POINTS, len(finite)))
    images = np.array([group[:, 0].mean() for group in groups])
    low, mean, high = (np.array([reduce(group[:, 1]) for group in groups]) for reduce in (np.min, np.mean, np.max))
    return images, low, mean, high
