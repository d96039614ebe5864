"""The tables and the figure of `make evidence`, from the files that its jobs wrote.

findings.json has `models` (one for each finished model, see `measured`), `points` (loss and accuracy of each probe
during training), `baselines`, `findings` (a text for each finding) and `cpu_hours`. findings.md has the same as a
table. What is not measured yet is null.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.stats import spearmanr

from data_prep.common.files import atomic_write, read_json, write_json
from pipeline.checkpoint.metrics_log import read_rows
from pipeline.config import ModelConfig
from pipeline.costs import parameter_count
from pipeline.model.gpt_config import gpt2_config
from pipeline.results.text import percent
from tests.benchmarks.evidence.figures import draw_depth
from tests.benchmarks.evidence.jobs import FINE_TUNED, MASKED, REPEATED, SIZES, Model, Places

NUMBERS, PAGE, DEPTH = "findings.json", "findings.md", "accuracy_by_depth.png"
COLUMNS = {
    "name": "model", "parameters": "parameters", "images": "images", "valid_loss": "valid loss", "ridge": "ridge probe",
    "probe": "linear probe", "layer": "best layer", "first": "first", "last": "last", "random": "random weights",
    "fine_tuned": "fine-tuned", "from_scratch": "from scratch",
}  # fmt: skip
"""Keys of `measured` that the table shows, with their titles."""


def write_findings(places: Places, ends: Sequence[int], cpu_seconds: float) -> None:
    """Writes and prints what is measured so far; `ends` are the images of the finished models, the longest last."""
    models = [measured(places, model, images) for model in (*SIZES, MASKED, *REPEATED) for images in ends]
    models = [one for one in models if one["valid_loss"] is not None]
    points = [point for model in SIZES for point in probes(places, model, ends)]
    baselines = _baselines(places, ends[-1])
    longest = {one["name"]: one for one in models if one["images"] == ends[-1]}
    held_out = _read(places.out / "scaling" / "scaling.json").get("held_out")
    findings = {name: text for name, text in sentences(longest, points, baselines, held_out) if text}
    lines = [*_table(models), "", *(f"- linear probe on {name}: {percent(own)}" for name, own in baselines.items())]
    lines += [f"- {name}: {text}" for name, text in findings.items()]
    lines += [f"- cost: {cpu_seconds / 3600:.1f} CPU-hours"]
    print("\n".join(lines), flush=True)
    drawn = [one for one in longest.values() if one["accuracy_by_layer"]]
    if drawn:
        draw_depth(drawn, baselines, places.out / DEPTH)
    with atomic_write(places.out / PAGE) as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    content = {"models": models, "points": points, "baselines": baselines, "findings": findings}
    write_json(places.out / NUMBERS, content | {"cpu_hours": cpu_seconds / 3600})


def measured(places: Places, model: Model, images: int) -> dict[str, Any]:
    """What is known of a finished model: the loss in nats per token, accuracies as fractions.

    `ridge` is the last probe of the training; `probe`, `random`, `fine_tuned` and `from_scratch` are on test, `first`,
    `last` and `..._by_layer` on valid.
    """
    run, results = places.branch(model, images), places.results(model, images)
    random_weights = results / "random_weights"
    rows = _rows(run)
    probe, random = (_read(folder / "linear_probe.json") for folder in (results, random_weights))
    by_layer = probe.get("valid_accuracy_by_layer") or [None]
    return {
        "name": model.name,
        "parameters": _parameters(run),
        "images": images,
        "valid_loss": _last(rows, "valid_loss"),
        "ridge": _last(rows, "probe_accuracy"),
        "probe": probe.get("test_accuracy"),
        "interval": probe.get("test_accuracy_interval"),
        "layer": probe.get("best_layer"),
        "first": by_layer[0],
        "last": by_layer[-1],
        "random": random.get("test_accuracy"),
        "fine_tuned": _read(results / "fine_tune.json").get("test_accuracy"),
        "from_scratch": _read(random_weights / "fine_tune.json").get("test_accuracy"),
        "accuracy_by_layer": probe.get("valid_accuracy_by_layer") or [],
        "random_accuracy_by_layer": random.get("valid_accuracy_by_layer") or [],
    }


def probes(places: Places, model: Model, ends: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Loss and accuracy of each probe during training, on the trunk and at the ends of its branches."""
    for run in (places.trunk(model), *(places.branch(model, images) for images in ends)):
        rows = _rows(run)
        losses = {row["step"]: row["valid_loss"] for row in rows if "valid_loss" in row}
        for row in rows:
            if "probe_accuracy" in row and row["step"] in losses:
                known = {"valid_loss": losses[row["step"]], "accuracy": row["probe_accuracy"]}
                yield {"name": model.name, "run": run.name, "step": row["step"], **known}


def sentences(
    longest: dict[str, dict[str, Any]],
    points: Sequence[dict[str, Any]],
    baselines: dict[str, float],
    held_out: dict[str, Any] | None,
) -> Iterator[tuple[str, str | None]]:
    """Each finding with what came out; None for what is not measured. `longest`: the models of most images by name."""
    sizes = [longest[model.name] for model in SIZES if model.name in longest]
    by_depth = [_by_depth(one["name"], one["accuracy_by_layer"]) for one in sizes if one["accuracy_by_layer"]]
    yield "accuracy by depth", "; ".join(by_depth)
    yield "accuracy against loss", _by_loss(points)
    yield "accuracy at equal images", _accuracies(sizes, "ridge")
    equal = at_equal_loss(points)
    if equal:
        by_size = ", ".join(f"{name} {percent(accuracy)}" for name, accuracy in equal[1].items())
        yield "accuracy at equal loss", f"at {equal[0]:.3f} nats {by_size}"
    tuned, masked = (longest.get(model.name, {}) for model in FINE_TUNED)
    if tuned.get("fine_tuned") and baselines:
        kinds = {"fine-tuned": "fine_tuned", "from scratch": "from_scratch", "linear probe": "probe"}
        shown = [f"{kind} {percent(tuned[key])}" for kind, key in kinds.items() if tuned[key] is not None]
        yield "fine-tuning", ", ".join((*shown, f"raw pixels {percent(baselines['raw pixels'])}"))
    yield "masked against next color, linear probe", _accuracies([tuned, masked], "probe")
    yield "masked against next color, fine-tuned", _accuracies([tuned, masked], "fine_tuned")
    if held_out:
        yield (
            "scaling law",
            (
                f"predicts {held_out['predicted']['value']:.4f} for {held_out['run']}, measured "
                f"{held_out['measured']:.4f}: error {held_out['error']:+.2%}"
            ),
        )


def at_equal_loss(points: Sequence[dict[str, Any]]) -> tuple[float, dict[str, float]] | None:
    """The lowest loss that all sizes reach, and the accuracy of each there, interpolated between its probes."""
    curves: dict[str, list[tuple[float, float]]] = {model.name: [] for model in SIZES}
    for point in points:
        curves[point["name"]].append((point["valid_loss"], point["accuracy"]))
    if not all(curves.values()):
        return None
    loss = max(min(curve)[0] for curve in curves.values())
    if any(max(curve)[0] < loss for curve in curves.values()):
        return None
    return loss, {name: float(np.interp(loss, *zip(*sorted(curve), strict=True))) for name, curve in curves.items()}


def _by_depth(name: str, accuracies: Sequence[float]) -> str:
    best = int(np.argmax(accuracies))
    first, last = (100 * (accuracies[best] - accuracies[layer]) for layer in (0, -1))
    layers = len(accuracies) - 1
    return f"{name}: best at layer {best} of {layers}, {first:.1f} points above the first, {last:.1f} above the last"


def _by_loss(points: Sequence[dict[str, Any]]) -> str | None:
    if len(points) < 3:
        return None
    correlation = float(spearmanr(*([point[key] for point in points] for key in ("valid_loss", "accuracy"))).statistic)
    return f"rank correlation {correlation:.2f} over {len(points)} probes"


def _accuracies(models: Iterable[dict[str, Any]], key: str) -> str | None:
    known = [f"{one['name']} {percent(one[key])}" for one in models if one.get(key) is not None]
    return ", ".join(known) if len(known) > 1 else None


def _baselines(places: Places, images: int) -> dict[str, float]:
    """Test accuracies of the linear probe on raw pixels and on color histograms; they are equal for all models."""
    found = (_read(places.results(model, images) / "linear_probe.json") for model in SIZES)
    probe = next(filter(None, found), None)
    keys = {"raw pixels": "raw_pixel_test_accuracy", "color histograms": "color_histogram_test_accuracy"}
    return {name: probe[key] for name, key in keys.items()} if probe else {}


def _parameters(run: Path) -> int | None:
    """All parameters of a run's model, embeddings and head included."""
    path = run / "config.yaml"
    if not path.exists():
        return None
    config = yaml.safe_load(path.read_text())
    return parameter_count(gpt2_config(ModelConfig(**config["model"]), objective=config["objective"]["kind"]))


def _table(models: Sequence[dict[str, Any]]) -> list[str]:
    rows = [[_cell(key, one[key]) for key in COLUMNS] for one in models]
    return [f"| {' | '.join(row)} |" for row in (list(COLUMNS.values()), ["---"] * len(COLUMNS), *rows)]


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key in ("parameters", "images"):
        return f"{value:,}"
    if key == "valid_loss":
        return f"{value:.4f}"
    return str(value) if key in ("name", "layer") else percent(value)


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _rows(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return list(read_rows(path)) if path.exists() else []


def _last(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key) is not None and math.isfinite(row[key])]
    return values[-1] if values else None
