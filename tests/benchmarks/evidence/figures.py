"""Accuracy by depth, as figure 2 of the paper."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def draw_depth(models: Sequence[dict[str, Any]], baselines: Mapping[str, float], path: Path) -> None:
    """Accuracy on valid of the linear probe against relative depth, a line a model; dotted with initial weights."""
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for number, one in enumerate(models):
        color = f"C{number}"
        for accuracies, line in ((one["accuracy_by_layer"], "o-"), (one["random_accuracy_by_layer"], ":")):
            depth = [layer / max(len(accuracies) - 1, 1) for layer in range(len(accuracies))]
            label = one["name"] if line == "o-" else None
            axes.plot(depth, [100 * value for value in accuracies], line, color=color, markersize=4, label=label)
    for name, accuracy in baselines.items():
        axes.axhline(100 * accuracy, color="0.6", linewidth=0.8)
        axes.text(1.0, 100 * accuracy, name, color="0.4", fontsize=8, ha="right", va="bottom")
    axes.set(xlabel="layer / number of layers", ylabel="linear probe, accuracy on valid in percent")
    figure.legend(title="dotted: initial weights", frameon=False, fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=120)
