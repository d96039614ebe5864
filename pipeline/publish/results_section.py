"""The results in a model card: tables, figures, and the hub's model-index."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from pipeline.model_folder.card import HUB_DATASETS
from pipeline.results.curve import CURVE
from pipeline.results.headline import headlines_of
from pipeline.results.published import compared_with_published
from pipeline.results.schema import RANDOM_WEIGHTS, Results, read_results

RESULTS = Path("results")
"""The subfolder of a published model with its results."""
METRICS = {
    "nats_per_color": "nats per color",
    "bits_per_color": "bits per color",
    "test_accuracy": "test accuracy",
}
"""The keys of a task's JSON that go into the model-index, with their names."""


def card_sections(folder: Path) -> list[str]:
    """The sections about results in the card of a published model: training curve, results, published numbers."""
    results, random_weights = (read_results(folder / path) for path in (RESULTS, RESULTS / RANDOM_WEIGHTS))
    figures = sorted(file.name for file in (folder / RESULTS).glob("*.png"))
    curve = _figure(CURVE) if CURVE in figures else ""
    shown = [name for name in figures if name != CURVE]
    return [curve, _results_section(results, random_weights, shown), _published_section(results)]


def eval_results(results: Results) -> list[EvalResult]:
    """The hub's model-index: accuracies as image classification, the other numbers as image generation."""
    return [
        EvalResult(
            task_type="image-classification" if key == "test_accuracy" else "unconditional-image-generation",
            dataset_type=HUB_DATASETS.get(result["dataset"], _slug(result["dataset"])),
            dataset_name=result["dataset"],
            dataset_split=result.get("split", "test"),
            metric_type="accuracy" if key == "test_accuracy" else key,
            metric_name=f"{name}: {METRICS[key]}",
            metric_value=value,
        )
        for result in results.values()
        for name, key, value in _numbers(result["title"], result)
    ]


def _numbers(name: str, result: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """(name, key, value) of the numbers in a task's JSON, nested objects included."""
    for key in METRICS:
        if isinstance(result.get(key), float):
            yield name, key, result[key]
    for key, value in result.items():
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                yield from _numbers(f"{name}, {part.get('name', key)}".replace("_", " "), part)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "images"


def _results_section(results: Results, random_weights: Results, figures: list[str]) -> str:
    """A table of all headlines, with a column for initial weights if measured, and the figures."""
    untrained = {row.name: row.text for result in random_weights.values() for row in headlines_of(result)}
    rows = [
        [result["dataset"], row.name, row.detail, row.text, untrained.get(row.name, "")]
        for result in results.values()
        for row in headlines_of(result)
    ]
    head = ["Dataset", "Measure", "Chosen", "This model", "Random weights"]
    filled = [place for place in range(len(head)) if any(row[place] for row in rows)]
    table = _table([head[place] for place in filled], [[row[place] for place in filled] for row in rows])
    parts = [part for part in (table, *map(_figure, figures)) if part]
    return "\n\n".join(["## Results", *parts]) if parts else ""


def _published_section(results: Results) -> str:
    """Tables of published numbers, by measure, each starting with the measured result."""
    parts = []
    for measure, (ours, theirs) in compared_with_published(results).items():
        rows = [[result["dataset"], f"**this model: {row.name}**", row.text, "measured"] for result, row in ours]
        rows += [list(row[1:]) for row in theirs]
        parts += [f"**{measure}**", _table(["Dataset", "System", "Value", "Source"], rows)]
    if not parts:
        return ""
    scale = (
        "Numbers are comparable only on the same dataset, and losses only with the same palette; the others are for "
        "orientation. Published probes use features learned on ImageNet."
    )
    return "\n\n".join(["### Published numbers", *parts, scale])


def _table(head: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _figure(name: str) -> str:
    return f"![{name.removesuffix('.png').replace('_', ' ')}]({RESULTS / name})"
