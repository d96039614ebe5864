"""The results in a model card: tables, figures, and the hub's model-index."""

import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from data_prep.common.files import read_json
from pipeline.model_folder.card import HUB_DATASETS
from pipeline.model_folder.training_record import read_training_record
from pipeline.results.claims import training_images_sentence, where_baselines_win
from pipeline.results.curve import CURVE, describe_curve, has_losses
from pipeline.results.headline import Results, headlines_of, measured_split
from pipeline.results.numbers import legend, numbers_table
from pipeline.results.published import LOWER_IS_BETTER, compared_with_published, our_rows
from pipeline.results.schema import RANDOM_WEIGHTS, read_dataset, read_results
from pipeline.results.task_files import read_task_files

logger = logging.getLogger(__name__)

RESULTS = Path("results")
"""The subfolder of a published model with its results."""
METRICS = {
    "nats_per_color": "nats per color",
    "bits_per_color": "bits per color",
    "test_accuracy": "test accuracy",
}
"""The keys of a task's JSON that go into the model-index, with their names."""


def card_sections(folder: Path) -> list[str]:
    """The sections about results in the card of a published model: training curve, results, published numbers.

    Results that can't be read are logged, and the card names them.
    """
    results, random_weights = (read_results(folder / path) for path in (RESULTS, RESULTS / RANDOM_WEIGHTS))
    unreadable = read_task_files(folder / RESULTS)[1]
    of_random_weights = read_task_files(folder / RESULTS / RANDOM_WEIGHTS)[1]
    unreadable |= {f"{RANDOM_WEIGHTS}/{name}": reason for name, reason in of_random_weights.items()}
    for name, reason in unreadable.items():
        logger.warning(f"{name} {reason}; the card excludes it")
    figures = sorted(file.name for file in (folder / RESULTS).glob("*.png"))
    record = read_training_record(folder)
    drawn = CURVE in figures and has_losses(table := record.table)
    described = describe_curve(table, results.get("density"))[0] if drawn else "training"
    curve = _figure(CURVE, described) if CURVE in figures else ""
    alternatives = {
        f"{task}.png": f"{result['title']}: {result.get('summary', '')}" for task, result in results.items()
    }
    shown = [_figure(name, alternatives.get(name, "")) for name in figures if name != CURVE]
    side = math.isqrt(read_json(folder / "config.json")["n_positions"])
    trained_on, started_from = record.trained_on, (record.settings.get("start") or {}).get("path")
    about = training_images_sentence(results, trained_on, started_from, read_dataset(folder / RESULTS, trained_on))
    lead = f"Images of {side}x{side} pixels. {about}" if results else ""
    excluded = [f"{name} {reason}" for name, reason in unreadable.items()]
    return [curve, _results_section(results, random_weights, shown, lead, excluded), _published_section(results, side)]


def eval_results(results: Results) -> list[EvalResult]:
    """The hub's model-index: accuracies as image classification, the other numbers as image generation."""
    return [
        EvalResult(
            task_type="image-classification" if key == "test_accuracy" else "unconditional-image-generation",
            dataset_type=HUB_DATASETS.get(result["dataset"], _slug(result["dataset"])),
            dataset_name=result["dataset"],
            dataset_split=measured_split(result),
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
        if isinstance(result.get(key), float) and math.isfinite(result[key]):
            yield name, key, result[key]
    for key, value in result.items():
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                yield from _numbers(f"{name}, {part.get('name', key)}".replace("_", " "), part)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "images"


def _results_section(
    results: Results, random_weights: Results, figures: list[str], lead: str, excluded: list[str]
) -> str:
    """A table of all headlines with the baselines beside them, where a baseline wins, and the figures.

    figures: in Markdown. lead: what was measured. excluded: results that can't be read, with the reasons.
    """
    datasets = [result["dataset"] for result in results.values() for _ in headlines_of(result)]
    numbers = numbers_table(results, random_weights)
    rows = [[dataset, *row] for dataset, row in zip(datasets, numbers.rows, strict=True)]
    wins = where_baselines_win(results, random_weights)
    parts = [
        lead,
        _table(["Dataset", *numbers.head], rows),
        "\n".join(["**Where a baseline wins**\n", *(f"- {sentence}" for sentence in wins)]) if wins else "",
        legend(numbers) if rows else "",
        f"Excluded, because they can't be read: {'; '.join(excluded)}." if excluded else "",
        *figures,
    ]
    shown = [part for part in parts if part]
    return "\n\n".join(["## Results", *shown]) if shown else ""


def _published_section(results: Results, side: int) -> str:
    """Tables of published numbers, by measure, each starting with the measured result. side: of the model's images."""
    parts = []
    for measure, (ours, theirs) in compared_with_published(results).items():
        rows = [
            [result["dataset"], f"**{name}**" if is_model else name, number, "measured"]
            for result, name, number, is_model in our_rows(ours)
        ]
        rows += [list(row[1:]) for row in theirs]
        better = "lower" if measure in LOWER_IS_BETTER else "higher"
        parts += [f"**{measure}** ({better} is better)", _table(["Dataset", "System", "Value", "Source"], rows)]
    if not parts:
        return ""
    scale = (
        f"This model was measured at {side}x{side}. Numbers are comparable only on the same dataset, and losses only "
        "with the same palette; the others are for orientation. Published probes use features learned on ImageNet."
    )
    return "\n\n".join(["### Published numbers", *parts, scale])


def _table(head: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    escaped = [[" ".join(cell.replace("|", r"\|").split()) for cell in row] for row in rows]  # names are anyone's
    lines = [head, ["---"] * len(head), *escaped]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _figure(name: str, alternative: str) -> str:
    """A figure with its alternative text; the name of the file if there is none."""
    text = " ".join(re.sub(r"[][\n]", " ", alternative).split()) or name.removesuffix(".png").replace("_", " ")
    return f"![{text}]({RESULTS / name})"
