"""Accuracy against validation loss over runs: of the probe during training, and of results of `evaluate`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.checkpoint.metrics_log import METRICS_FILE, read_backwards
from pipeline.results.report.compare import lines_of, read_checkpoints
from pipeline.scaling.runs import Run

TASK = "linear_probe"
"""The task whose results are shown."""


@dataclass(frozen=True)
class Probed:
    """One checkpoint, or one step of a run."""

    name: str
    """Of the run, or of the results folder."""
    source: str
    """probe: a row of metrics.jsonl; evaluate: results of linear_probe."""
    step: int | None
    parameters: int
    valid_loss: float
    """Nats per token; of a probe between two validations, interpolated."""
    accuracy: float
    """A fraction: of the best layer, on the probe's test images or on the validation split."""


def read_accuracies(runs: Sequence[Run], results: Sequence[Path]) -> tuple[list[Probed], list[str]]:
    """All accuracies with a validation loss, and a note if the probes' are excluded because they can't be compared.

    Raises ValueError if the results can't be: of other shard sets or options (pipeline/results/report/compare.py).
    """
    by_run = {run.name: (run.probe, own) for run in runs if (own := _of_run(run))}
    same = len({probe for probe, _ in by_run.values()}) <= 1
    found = [probed for _, own in by_run.values() for probed in own if same]
    shown = (f"{name} {train}, {test} of {data[:12]}" for name, ((train, test, data), _) in by_run.items())
    notes = [f"the probes' accuracies are excluded: they are of other images ({'; '.join(shown)})."] * (not same)
    measured = {str(folder): read_checkpoints(folder, TASK, []) for folder in results}
    for line in lines_of(measured, TASK)[0] if measured else []:
        for point in line.points:
            if point.valid_accuracy is not None:
                values = point.step, point.parameters, point.valid_loss, point.valid_accuracy
                found.append(Probed(Path(line.name).resolve().name, "evaluate", *values))
    return found, notes


def _of_run(run: Run) -> list[Probed]:
    path = run.path / METRICS_FILE
    steps, losses = np.array([(row["step"], row["valid_loss"]) for row in run.validations], dtype=float).T
    return [
        Probed(run.name, "probe", step, run.parameters, float(np.interp(step, steps, losses)), row["probe_accuracy"])
        for row in reversed(list(read_backwards(path, "probe_accuracy", path.stat().st_size)))
        if steps[0] <= (step := row["step"]) <= steps[-1] and isinstance(row["probe_accuracy"], float)
    ]


def rank_correlation(accuracies: Sequence[Probed]) -> float | None:
    """Spearman's correlation of accuracy with loss; None for fewer than three points, or if one does not vary."""
    from scipy.stats import spearmanr

    losses, fractions = ([getattr(one, key) for one in accuracies] for key in ("valid_loss", "accuracy"))
    if len(accuracies) < 3 or len(set(losses)) < 2 or len(set(fractions)) < 2:
        return None
    return float(spearmanr(losses, fractions).statistic)
