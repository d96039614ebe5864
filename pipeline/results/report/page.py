"""report.html: all results in one self-contained file, with results.json for programs next to it.

One task is used by name: the nats and baselines of density, if measured, appear in the training curve and in the
section on how to read the report.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_prep.common.files import locked
from data_prep.shards.reader import ShardSet
from pipeline.checkpoint.metrics_table import read_table, table_of
from pipeline.model_folder.training_record import averaged_text, unfinished
from pipeline.results.claims import training_images_sentence, value_of, where_baselines_win
from pipeline.results.curve import CURVE, describe_curve, draw_curve, has_losses
from pipeline.results.headline import Results, measured_split
from pipeline.results.numbers import legend, numbers_table
from pipeline.results.provenance import INITIAL_WEIGHTS, ModelFacts
from pipeline.results.published import LOWER_IS_BETTER, compared_with_published, our_rows
from pipeline.results.report.html import note, write_page
from pipeline.results.report.sections import generic_section
from pipeline.results.schema import RANDOM_WEIGHTS, commands, dataset_of, read_measured, write_results
from pipeline.results.text import percent

logger = logging.getLogger(__name__)

REPORT = "report.html"
LOCK = ".report.lock"

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

    Results of another model or shard set, and results that can't be read, are excluded, and the report lists their
    files. A section or a figure that fails is excluded. If several commands finish tasks at the same time, they write
    one after the other, so the last report has all results.
    """
    with locked(folder / LOCK, str(folder / REPORT)):
        measured = read_measured(folder, random_weights or folder / RANDOM_WEIGHTS, facts, shards)
        order = [*sections, *(task for task in measured.tasks if task not in sections)]
        tasks = {task: measured.tasks[task] for task in order if task in measured.tasks}
        numbers = numbers_table(tasks, measured.random_weights)
        write_page(
            folder / REPORT,
            "report.html",
            title=f"Image GPT: {shards.name}",
            facts=facts,
            shards=shards,
            header=_header(facts, shards, tasks),
            masked=facts.objective == "masked_color",
            training_images=_training_images(facts, shards, tasks),
            unfinished=unfinished(facts.checkpoint_step, facts.planned_steps),
            not_run=not_run.values(),
            numbers=numbers,
            legend=f"{legend(numbers)} {_choices(tasks)}",
            baselines_win=where_baselines_win(tasks, measured.random_weights),
            curve=_curve(folder, facts, shards, tasks),
            sections=[
                {"title": result["title"], "html": _section(sections.get(task, generic_section), result, folder)}
                for task, result in tasks.items()
            ],
            published=compared_with_published(tasks),
            our_rows=our_rows,
            lower_is_better=LOWER_IS_BETTER,
            reading=[*_by_layer(tasks), _beyond_counts(tasks.get("density"))],
            commands=commands(facts, measured),
            others=measured.others,
            unreadable=measured.unreadable,
        )
        write_results(folder, facts, shards, measured, list(not_run))
    return folder / REPORT


def _section(render: Section, result: dict[str, Any], folder: Path) -> str:
    """A task's section. One that fails, as on a result of an earlier version, is built from its JSON instead."""
    for attempt in (render, generic_section):
        try:
            return attempt(result, folder)
        except Exception:
            logger.warning(f"the section of {result['task']} in {REPORT} can't be written as usual", exc_info=True)
    return note(f"This section could not be written; the numbers are in {folder.name}/{result['task']}.json.")


def _training_images(facts: ModelFacts, shards: ShardSet, tasks: Results) -> str:
    trained = facts.source != INITIAL_WEIGHTS
    return training_images_sentence(tasks, facts.trained_on, facts.started_from, dataset_of(shards), trained=trained)


def _header(facts: ModelFacts, shards: ShardSet, tasks: Results) -> dict[str, str]:
    planned = "" if facts.checkpoint_step is None or facts.planned_steps is None else f" of {facts.planned_steps:,}"
    averaged = {"Weights": steps} if (steps := averaged_text(facts.averaged_steps, facts.weights)) else {}
    return {
        "Parameters": f"{facts.parameters:,}",
        "Layers × width × heads": f"{facts.layers} × {facts.width} × {facts.heads}",
        "Block": "the paper's (RMSNorm, no biases)" if facts.block == "igpt" else "stock GPT-2",
        "Objective": {"next_color": "the next color", "masked_color": "masked pixels (BERT)"}[facts.objective],
        "Images": f"{facts.resolution} × {facts.resolution}, {shards.colors} colors",
        "Training step": _count(facts.checkpoint_step) + planned,
        **averaged,
        "Images seen in training": _count(facts.images_seen),
        "Trained on": facts.source or "not recorded",
        "Measured on": f"{shards.name}{_classes(tasks)}",
        "Images also in train": _in_train(shards),
        "Precision": _precision(tasks),
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


def _classes(tasks: Results) -> str:
    """The number of classes that occur among the labelled images that were measured; "" if there are none."""
    counts = [0]
    for result in tasks.values():
        if isinstance(by_split := result.get("images_by_class"), dict) and by_split:
            counts.append(sum(any(images) for images in zip(*by_split.values(), strict=False)))
    return f", {max(counts):,} classes" if max(counts) else ""


def _precision(tasks: Results) -> str:
    """The precision of the forward passes, as the results record it."""
    options = [result.get("options") for result in tasks.values()]
    found = dict.fromkeys(str(each["precision"]) for each in options if isinstance(each, dict) and "precision" in each)
    return " and ".join(found) or "not recorded"


def _choices(tasks: Results) -> str:
    """How the settings were chosen, if recorded."""
    sentences = []
    if any("valid_images" in result and "choice" not in result for result in tasks.values()):
        sentences.append(
            "The values in the column Chosen were selected on the validation split; the test split was used only for "
            "the final number."
        )
    for result in tasks.values():
        if isinstance(result.get("choice"), str):
            sentences.append(f"{result['title']}: {result['choice']}.")
    return " ".join(sentences)


def _curve(folder: Path, facts: ModelFacts, shards: ShardSet, tasks: Results) -> dict[str, Any] | None:
    """Draws the training curve, if the model folder has the run's metrics."""
    density = tasks.get("density")
    try:
        table = read_table(facts.metrics) if facts.metrics is not None else table_of([])
        if not has_losses(table):
            return None
        draw_curve(table, shards.colors, density, folder / CURVE)
        alternative, caption = describe_curve(table, density)
    except Exception:
        logger.warning(f"{folder / CURVE} can't be drawn; the report is written without it", exc_info=True)
        return None
    return {"path": folder / CURVE, "alternative": alternative, "caption": caption}


def _by_layer(tasks: Results) -> list[str]:
    """For each task that tried every layer: which was the best on validation, beside the first."""
    sentences = []
    for result in tasks.values():
        layers, best = result.get("valid_accuracy_by_layer"), result.get("best_layer")
        if not isinstance(layers, list) or not isinstance(best, int) or "layers" in result or best >= len(layers):
            continue
        if best == 0:
            sentences.append(
                f"{result['title']}: no layer is better on validation than layer 0, the input of the first block."
            )
        else:
            sentences.append(
                f"{result['title']}: layer {best} of {len(layers) - 1} is the best on validation "
                f"({percent(layers[best])}; layer 0, the input of the first block, {percent(layers[0])})."
            )
    return sentences


def _beyond_counts(density: dict[str, Any] | None) -> str:
    """How the model's nats compare with the count-based baselines; "" for masked models, which do not compare, or if
    the nats are missing."""
    keys = ("nats_per_color", "bigram_nats_per_color", "left_times_above_nats_per_color")
    nats, bigram, neighbors = (None if density is None else value_of(density, key) for key in keys)
    if density is None or density.get("masked") or nats is None or bigram is None or neighbors is None:
        return ""
    loss = f"Its loss on {measured_split(density)}"
    if nats >= bigram:
        return f"{loss} is no better than the baseline of the previous color; it needs more training."
    if nats >= neighbors:
        return (
            f"{loss} is better than the baseline of the previous color, but no better than the baseline of two "
            "neighboring colors: it continues colors, not objects."
        )
    return f"{loss} is better than the baseline of two neighboring colors, so it has learned structure beyond them."
