"""report.html: all results in one self-contained file, with results.json for programs next to it.

One task is used by name: the nats and baselines of density, if measured, appear in the training curve and in the
section on how to read the report.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_prep.common.files import locked
from data_prep.shards.reader import ShardSet
from pipeline.checkpoint.metrics_log import read_rows
from pipeline.model_folder.training_record import unfinished
from pipeline.results.curve import CURVE, draw_curve, has_losses
from pipeline.results.headline import headlines_of
from pipeline.results.provenance import ModelFacts
from pipeline.results.published import compared_with_published
from pipeline.results.report.html import write_page
from pipeline.results.report.sections import generic_section
from pipeline.results.schema import RANDOM_WEIGHTS, Results, commands, read_measured, write_results
from pipeline.results.text import MISSING, percent

REPORT = "report.html"
LOCK = ".report.lock"
BASELINES = {
    "Raw pixels": "raw_pixel_test_accuracy",
    "Color histogram": "color_histogram_test_accuracy",
    "Most common class": "majority_class_test_accuracy",
}
"""Baselines that do not use the model, and their keys in the probes' JSON."""

Section = Callable[[dict[str, Any], Path], str]
"""Maps a task's JSON and the results folder to its report section, HTML without a heading."""


def write_report(
    folder: Path,
    facts: ModelFacts,
    shards: ShardSet,
    random_weights: Path | None = None,
    not_run: Mapping[str, str] = {},
    *,
    sections: Mapping[str, Section] = {},
) -> Path:
    """Writes RESULTS/report.html and results.json from the results in the folder; returns the path of the page.

    random_weights: the results folder of the same model with initial weights; RESULTS/random_weights if not given.
    not_run: titles by name of the tasks that did not run yet, which the head of the report lists. sections: by task,
    in the order of the report; other tasks follow, with a section built from their JSON.

    Results of another model or shard set are excluded, and the report lists their files. If several commands finish
    tasks at the same time, they write one after the other, so the last report has all results.
    """
    with locked(folder / LOCK, str(folder / REPORT)):
        measured = read_measured(folder, random_weights or folder / RANDOM_WEIGHTS, facts, shards)
        order = [*sections, *(task for task in measured.tasks if task not in sections)]
        tasks = {task: measured.tasks[task] for task in order if task in measured.tasks}
        write_page(
            folder / REPORT,
            "report.html",
            title=f"Image GPT: {shards.name}",
            facts=facts,
            shards=shards,
            header=_header(facts, shards),
            unfinished=unfinished(facts.checkpoint_step, facts.planned_steps),
            not_run=not_run.values(),
            numbers=_numbers(tasks, measured.random_weights),
            curve=_curve(folder, facts, shards, tasks),
            sections=[
                {"title": result["title"], "html": sections.get(task, generic_section)(result, folder)}
                for task, result in tasks.items()
            ],
            published=compared_with_published(tasks),
            beyond_counts=_beyond_counts(tasks.get("density")),
            commands=commands(facts, measured),
            others=measured.others,
        )
        write_results(folder, facts, shards, measured, list(not_run))
    return folder / REPORT


def _header(facts: ModelFacts, shards: ShardSet) -> dict[str, str]:
    planned = "" if facts.checkpoint_step is None or facts.planned_steps is None else f" of {facts.planned_steps:,}"
    return {
        "Parameters": f"{facts.parameters:,}",
        "Layers × width × heads": f"{facts.layers} × {facts.width} × {facts.heads}",
        "Block": "the paper's (RMSNorm, no biases)" if facts.block == "igpt" else "stock GPT-2",
        "Objective": {"next_color": "the next color", "masked_color": "masked pixels (BERT)"}[facts.objective],
        "Images": f"{facts.resolution} × {facts.resolution}, {shards.colors} colors",
        "Training step": _count(facts.checkpoint_step) + planned,
        "Images seen in training": _count(facts.images_seen),
        "Trained on": facts.source or "not recorded",
        "Measured on": f"{shards.name}, {len(shards.classes)} classes",
        "Images also in train": _in_train(shards),
        "Shard set": shards.digest[:12],
        "Palette": facts.palette_sha256[:12],
        "Model": facts.digest[:12],
    }


def _in_train(shards: ShardSet) -> str:
    """The held-out images with the tokens of a training image."""
    images = {name: shards.manifest["splits"][name]["images"] for name in shards.images_in_train}
    counts = [f"{number:,} of {images[name]:,} of {name}" for name, number in shards.images_in_train.items()]
    return ", ".join(counts) + " (equal tokens)" if counts else "not counted"


def _count(number: int | None) -> str:
    return "not recorded" if number is None else f"{number:,}"


def _numbers(tasks: Results, random_weights: Results) -> dict[str, Any]:
    """The table of all headlines, with columns for initial weights and for baselines that do not use the model.

    Columns of baselines without any value are dropped.
    """
    text, rows = 2, []
    for task, result in tasks.items():
        untrained = headlines_of(random_weights[task]) if task in random_weights else []
        texts = {headline.name: headline.text for headline in untrained}
        for row in headlines_of(result):
            baselines = [percent(result.get(key)) for key in BASELINES.values()]
            rows.append([row.name, row.detail, row.text, texts.get(row.name, MISSING), *baselines])
    head = ["Measure", "Chosen", "This model", "Random weights", *BASELINES]
    shown = [place for place in range(len(head)) if place <= text or any(row[place] != MISSING for row in rows)]
    return {
        "head": [head[place] for place in shown],
        "rows": [[row[place] for place in shown] for row in rows],
        "text": text,
    }


def _curve(folder: Path, facts: ModelFacts, shards: ShardSet, tasks: Results) -> Path | None:
    """Draws the training curve, if the model folder has the run's metrics."""
    rows = list(read_rows(facts.metrics)) if facts.metrics is not None else []
    if not has_losses(rows):
        return None
    draw_curve(rows, shards.colors, tasks.get("density"), folder / CURVE)
    return folder / CURVE


def _beyond_counts(density: dict[str, Any] | None) -> str:
    """How the model's nats compare with the count-based baselines; "" for masked models, which do not compare, or if
    the nats are missing."""
    if density is None or density["masked"] or density["nats_per_color"] is None:
        return ""
    if density["nats_per_color"] >= density["bigram_nats_per_color"]:
        return "Its loss is no better than the baseline of the previous color; it needs more training."
    if density["nats_per_color"] >= density["left_times_above_nats_per_color"]:
        return (
            "Its loss is better than the baseline of the previous color, but no better than the baseline of two "
            "neighboring colors: it continues colors, not objects."
        )
    return "Its loss is better than the baseline of two neighboring colors, so it has learned structure beyond them."
