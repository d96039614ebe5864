"""The tables and the figure of `make evidence`, from the files that its jobs wrote.

findings.json has `models` (one for each finished model, see `measured`), `points` (loss and accuracy of each probe
during training), `baselines`, `findings` (a text for each finding) and `cpu_hours`. findings.md has the same as a
table. What is not measured yet is null.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.stats import spearmanr

from data_prep.common.files import atomic_write, read_json, write_json
from pipeline.checkpoint.metrics_log import read_last_row, read_rows
from pipeline.config import ModelConfig
from pipeline.costs import parameter_count
from pipeline.model.gpt_config import gpt2_config
from pipeline.results.text import number, percent
from tests.benchmarks.evidence.figures import draw_depth
from tests.benchmarks.evidence.jobs import FINE_TUNED, MASKED, SECOND_SEEDS, SIZES, Model, Places

PIXELS = "raw pixels"
NUMBERS, PAGE, DEPTH = "findings.json", "findings.md", "accuracy_by_depth.png"
COLUMNS = {
    "name": "model", "parameters": "parameters", "images": "images", "valid_loss": "valid loss", "ridge": "ridge probe",
    "probe": "linear probe (95%)", "layer": "best layer", "first": "first layer, valid", "best": "best layer, valid",
    "last": "last layer, valid", "random": "linear probe, initial weights", "fine_tuned": "fine-tuned",
    "from_initial": "trained from scratch",
}  # fmt: skip
"""Keys of `measured` that the table shows, with their titles."""
NOTES = (
    "valid loss: nats per token; of the masked model on masked pixels, so it is not comparable with the others",
    "ridge probe: 1,500 images of valid, other images choose its layer; +- 2.5 points (95%)",
    "accuracies without another split's name: test, 10,000 images; valid: 5,000 images",
    "learning rates were searched for 0.1m and 0.4m only, after 8,000 images",
)


def write_findings(places: Places, counts: Sequence[int], cpu_seconds: float) -> None:
    """Writes and prints what is measured so far; counts: images of the finished models, the largest last."""
    known = [measured(places, model, images) for model in (*SIZES, MASKED, *SECOND_SEEDS) for images in counts]
    models = [one for one in known if one["valid_loss"] is not None]
    points = [point for model in SIZES for point in probes(places, model, counts)]
    baselines = _baselines(places, counts[-1])
    held_out = _read(places.out / "scaling" / "scaling.json").get("held_out")
    findings = dict(sentences(models, points, baselines, counts[-1], held_out))
    lines = [*_table(models), "", *(f"- {note}" for note in NOTES)] if models else ["No model is finished yet."]
    lines += [f"- linear probe on {name}: {percent(own['test'])}" for name, own in baselines.items()]
    lines += ["", *(f"- {name}: {text or 'not measured yet'}" for name, text in findings.items())]
    lines += [f"- cost: {cpu_seconds / 3600:.1f} CPU-hours"]
    print("\n".join(lines), flush=True)
    drawn = [one for one in models if one["images"] == counts[-1] and one["accuracy_by_layer"]]
    if drawn:
        draw_depth(drawn, {name: own["valid"] for name, own in baselines.items()}, places.out / DEPTH)
    with atomic_write(places.out / PAGE) as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    content = {"models": models, "points": points, "baselines": baselines, "findings": findings}
    write_json(places.out / NUMBERS, content | {"cpu_hours": cpu_seconds / 3600})


def measured(places: Places, model: Model, images: int) -> dict[str, Any]:
    """What is known of a finished model: the loss in nats per token, accuracies as fractions.

    `ridge` is the last probe of the training, on valid; `probe`, `random`, `fine_tuned` and `from_initial` are on test;
    `first`, `best`, `last` and `..._by_layer` on valid.
    """
    run, results = places.branch(model, images), places.results(model, images)
    random_weights = results / "random_weights"
    probe, random = (_read(folder / "linear_probe.json") for folder in (results, random_weights))
    by_layer = probe["valid_accuracy_by_layer"] if probe else []
    tuned, initial = (_read(folder / "fine_tune.json") for folder in (results, random_weights))
    return {
        "name": model.name,
        "parameters": _parameters(run),
        "images": images,
        "valid_loss": _last(run, "valid_loss"),
        "ridge": _last(run, "probe_accuracy"),
        "probe": probe["test_accuracy"] if probe else None,
        "interval": probe["test_accuracy_interval"] if probe else None,
        "layer": probe["best_layer"] if probe else None,
        "first": by_layer[0] if by_layer else None,
        "best": max(by_layer) if by_layer else None,
        "last": by_layer[-1] if by_layer else None,
        "random": random["test_accuracy"] if random else None,
        "fine_tuned": tuned["test_accuracy"] if tuned else None,
        "from_initial": initial["test_accuracy"] if initial else None,
        "accuracy_by_layer": by_layer,
        "random_accuracy_by_layer": random["valid_accuracy_by_layer"] if random else [],
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
    models: Sequence[dict[str, Any]],
    points: Sequence[dict[str, Any]],
    baselines: dict[str, dict[str, float]],
    images: int,
    held_out: dict[str, Any] | None,
) -> Iterator[tuple[str, str | None]]:
    """Each finding with what came out; None for what is not measured. images: of the longest finished models."""
    longest = {one["name"]: one for one in models if one["images"] == images}
    sizes = [longest[model.name] for model in SIZES if model.name in longest]
    by_depth = [_by_depth(one["name"], one["accuracy_by_layer"]) for one in sizes if one["accuracy_by_layer"]]
    yield "accuracy by depth, valid", "; ".join(by_depth) or None
    yield "accuracy against loss", _by_loss(points)
    yield f"accuracy after {images:,} images, ridge probe", _accuracies(sizes, "ridge")
    yield "accuracy at equal loss, ridge probe of finished models", at_equal_loss(models)
    yield "second seeds", _second_seeds(longest)
    tuned, masked = (longest.get(model.name, {}) for model in FINE_TUNED)
    kinds = {"fine-tuned": "fine_tuned", "trained from scratch": "from_initial", "linear probe": "probe"}
    shown = [f"{kind} {percent(tuned[key])}" for kind, key in kinds.items() if tuned.get(key) is not None]
    pixels = [f"raw pixels {percent(own['test'])}" for name, own in baselines.items() if name == PIXELS]
    yield f"fine-tuning {FINE_TUNED[0].name}", ", ".join((*shown, *pixels)) if tuned.get("fine_tuned") else None
    yield "masked against next color, linear probe", _accuracies([tuned, masked], "probe")
    yield "masked against next color, fine-tuned", _accuracies([tuned, masked], "fine_tuned")
    yield "scaling law", _prediction(held_out) if held_out else None


def _prediction(held_out: dict[str, Any]) -> str:
    """Of the largest size, by a law of the others."""
    loss = held_out["predicted"]
    ends = f"{number(loss['low'])} to {number(loss['high'])}"
    return (
        f"of the other sizes, predicts {loss['value']:.4f} (95%: {ends}) for {held_out['run']}, measured "
        f"{held_out['measured']:.4f}: error {held_out['error']:+.2%}"
    )


def at_equal_loss(models: Sequence[dict[str, Any]]) -> str | None:
    """Accuracies at the lowest loss that all sizes reached, interpolated between each size's finished models."""
    curves = {model.name: [] for model in SIZES}  # type: dict[str, list[tuple[float, float]]]
    for one in models:
        if one["name"] in curves and one["ridge"] is not None:
            curves[one["name"]].append((one["valid_loss"], one["ridge"]))
    if not all(curves.values()):
        return None
    loss = max(min(curve)[0] for curve in curves.values())
    if any(max(curve)[0] < loss for curve in curves.values()):
        return "there is no loss that all sizes passed"
    found = {name: float(np.interp(loss, *zip(*sorted(curve), strict=True))) for name, curve in curves.items()}
    return f"at {loss:.3f} nats " + ", ".join(f"{name} {percent(accuracy)}" for name, accuracy in found.items())


def _by_depth(name: str, accuracies: Sequence[float]) -> str:
    best = int(np.argmax(accuracies))
    first, last = (100 * (accuracies[best] - accuracies[layer]) for layer in (0, -1))
    layers = len(accuracies) - 1
    return f"{name}: best at layer {best} of {layers}, {first:.1f} points above the first, {last:.1f} above the last"


def _by_loss(points: Sequence[dict[str, Any]]) -> str | None:
    """Rank correlations over all probes during training, which are not independent, and within each size."""
    texts = [f"over all {len(points)} probes {_rank_correlation(points)}"]
    for model in SIZES:
        own = [point for point in points if point["name"] == model.name]
        texts += [f"{model.name} {_rank_correlation(own)}"] if len(own) > 2 else []
    return f"rank correlation {', '.join(texts)}" if len(points) > 2 else None


def _rank_correlation(points: Sequence[dict[str, Any]]) -> str:
    losses, accuracies = ([point[key] for point in points] for key in ("valid_loss", "accuracy"))
    return f"{float(spearmanr(losses, accuracies).statistic):.2f}"


def _second_seeds(longest: dict[str, dict[str, Any]]) -> str | None:
    texts = []
    for model in SECOND_SEEDS:
        one, other = longest.get(model.recipe), longest.get(model.name)
        if one and other:
            loss, points = other["valid_loss"] - one["valid_loss"], 100 * (other["ridge"] - one["ridge"])
            texts.append(f"{model.name}: loss {loss:+.4f}, ridge probe {points:+.1f} points against seed 0")
    return "; ".join(texts) or None


def _accuracies(models: Iterable[dict[str, Any]], key: str) -> str | None:
    known = [f"{one['name']} {percent(one[key])}" for one in models if one.get(key) is not None]
    return ", ".join(known) if len(known) > 1 else None


def _baselines(places: Places, images: int) -> dict[str, dict[str, float]]:
    """Accuracies of the linear probe on raw pixels and on color histograms; they are equal for all models."""
    found = (_read(places.results(model, images) / "linear_probe.json") for model in SIZES)
    probe = next(filter(None, found), None)
    if probe is None:
        return {}
    keys = {PIXELS: "raw_pixel", "color histograms": "color_histogram"}
    return {
        name: {split: probe[f"{key}_{split}_accuracy"] for split in ("valid", "test")} for name, key in keys.items()
    }


def _parameters(run: Path) -> int | None:
    """All parameters of a run's model, embeddings and head included."""
    path = run / "config.yaml"
    if not path.exists():
        return None
    config = yaml.safe_load(path.read_text())
    return parameter_count(gpt2_config(ModelConfig(**config["model"]), objective=config["objective"]["kind"]))


def _table(models: Sequence[dict[str, Any]]) -> list[str]:
    rows = [[_with_interval(one) if key == "probe" else _cell(key, one[key]) for key in COLUMNS] for one in models]
    return [f"| {' | '.join(row)} |" for row in (list(COLUMNS.values()), ["---"] * len(COLUMNS), *rows)]


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key in ("parameters", "images"):
        return f"{value:,}"
    if key == "valid_loss":
        return f"{value:.4f}"
    return str(value) if key in ("name", "layer") else percent(value)


def _with_interval(one: dict[str, Any]) -> str:
    if one["probe"] is None:
        return ""
    return percent(one["probe"]) + (f" ({' to '.join(map(percent, one['interval']))})" if one["interval"] else "")


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _rows(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return list(read_rows(path)) if path.exists() else []


def _last(run: Path, key: str) -> float | None:
    path = run / "metrics.jsonl"
    row = read_last_row(path, key) if path.exists() else None
    return None if row is None else row[key]
