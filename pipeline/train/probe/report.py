"""How a probe is shown: its line among the derived quantities, the console line, the figure, and when it is falling."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from pipeline import costs
from pipeline.checkpoint.metrics_log import Row
from pipeline.train.setup import Inputs

FALLING = 3
"""A warning is logged when the accuracy has fallen for so many probes in a row."""
STANDARD_ERRORS = 2
"""And by more than so many standard errors of the accuracy."""
MOST_SHOWN = 9
"""Layers that the console shows; of a deeper model, the first and the last."""
INCHES, DOTS_PER_INCH = (7.0, 3.8), 100
COLOR = "#1f5fa8"


def cost(inputs: Inputs) -> str:
    """What the probes of a run are, and what they cost."""
    config, model, images = inputs.config, inputs.model_config, inputs.probe
    assert images is not None
    options, steps = config.probe, config.schedule.steps
    trained = config.batch.images_after(steps) * model.n_positions * costs.flops_per_token(model)
    count, one = options.count(steps), options.flops(model, images.classes)
    return (
        f"{count:,} probes of {model.n_layer + 1} layers, every {options.every_steps:,} steps: "
        f"{options.train_images:,} images in {images.classes:,} classes and 2 x {options.test_images:,} held-out ones "
        f"of {images.path}{_copies(images.valid_in_train)}; "
        f"{one:.3g} FLOP each, together {count * one / trained:.2%} of the training's FLOP"
    )


def _copies(valid_in_train: int | None) -> str:
    """What is known of held-out images that are also in train."""
    counted = "not counted how many" if valid_in_train is None else f"{valid_in_train:,}"
    return f" ({counted} images of valid are also in train)"


def sentence(row: Row) -> str:
    """The console line of a probe, after its step."""
    by_layer = row["probe_accuracy_by_layer"]
    each = ", ".join(map(percent, by_layer))
    ends = f"layer 0: {percent(by_layer[0])}, layer {len(by_layer) - 1}: {percent(by_layer[-1])}"
    return (
        f"probe accuracy {percent(row['probe_accuracy'])} at layer {row['probe_layer']}, which other images chose ("
        + (f"by layer: {each})" if len(by_layer) <= MOST_SHOWN else f"{ends})")
    )


def percent(accuracy: float) -> str:
    """As 12.3%."""
    return "NaN" if np.isnan(accuracy) else f"{accuracy:.1%}"


def warning(newest: Iterable[Row], test_images: int) -> str | None:
    """A warning at the first probe of a fall that is neither short nor within the noise of so many test images.

    newest: the probes, the newest first; read as far as the accuracy falls.
    """
    fall: list[Row] = []  # the newest first
    for row in newest:
        if row["probe_accuracy"] is None or (fall and row["probe_accuracy"] <= fall[-1]["probe_accuracy"]):
            break
        fall.append(row)
    if not _is_fall(fall, test_images) or _is_fall(fall[1:], test_images):  # the probe before has warned
        return None
    falling = ", ".join(f"{row['probe_accuracy']:.1%} at step {row['step']:,}" for row in reversed(fall))
    return (
        f"the probe accuracy has fallen for {len(fall) - 1} probes in a row, by more than {STANDARD_ERRORS} standard "
        f"errors of {test_images:,} images: {falling}"
    )


def _is_fall(fall: list[Row], test_images: int) -> bool:
    """Whether these falling probes, the newest first, are a fall to warn of."""
    if len(fall) <= FALLING:
        return False
    last, first = fall[0]["probe_accuracy"], fall[-1]["probe_accuracy"]
    return bool(first - last > STANDARD_ERRORS * (first * (1 - first) / test_images) ** 0.5)


def figure(row: dict[str, Any]) -> np.ndarray:
    """Accuracy by depth: uint8 (H, W, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    drawing = Figure(figsize=INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    axes, accuracy = drawing.add_subplot(), 100 * np.array(row["probe_accuracy_by_layer"])
    axes.plot(np.arange(len(accuracy)), accuracy, "-o", color=COLOR, markersize=4)
    axes.plot(row["probe_layer"], accuracy[row["probe_layer"]], "o", markersize=11, markerfacecolor="none", color=COLOR)
    axes.set_title(f"ridge probe at step {row['step']:,}: best layer {row['probe_layer']}")
    axes.set_xlabel(f"layer (0 = input of the first block, {len(accuracy) - 1} = after the final norm)")
    axes.set_ylabel("accuracy on held-out images (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(True, color="#e3e3e3", linewidth=0.7)
    canvas = FigureCanvasAgg(drawing)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
