"""report.html: what was measured, in one file that needs no other, and results.json beside it for programs."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from data_prep.common.files import locked
from data_prep.shards.reader import ShardSet
from pipeline.model_folder.training_record import unfinished
from pipeline.results.curve import CURVE, draw_curve, has_losses, read_metrics
from pipeline.results.headline import Headline, headlines_of
from pipeline.results.provenance import ModelFacts
from pipeline.results.published import PUBLISHED, RELATED
from pipeline.results.report.html import figure, note, table, write_page
from pipeline.results.report.sections import section
from pipeline.results.schema import RANDOM_WEIGHTS, Measured, Results, commands, read_measured, write_results
from pipeline.results.text import MISSING, percent

REPORT = "report.html"
LOCK = ".report.lock"
BASELINES = {
    "Raw pixels": "raw_pixel_test_accuracy",
    "Colour histogram": "color_histogram_test_accuracy",
    "Commonest class": "majority_class_test_accuracy",
}
"""What the probes' JSON holds of classifiers that do without the model."""


def write_report(
    folder: Path,
    facts: ModelFacts,
    shards: ShardSet,
    random_weights: Path | None = None,
    not_run: Mapping[str, str] = {},
) -> Path:
    """Writes RESULTS/report.html and results.json from the results that stand in the folder; returns the page's path.

    random_weights: the folder of results of the same model with initial weights; RESULTS/random_weights if not given.
    not_run: titles by name of the tasks that were asked for and did not run yet, which the report's head names.
    Results of another model or shard set are left out, and the report says so. Of several commands that finish tasks
    at once one writes after the other, so that the last one's report has them all.
    """
    with locked(folder / LOCK, str(folder / REPORT)):
        return _write_report(folder, facts, shards, random_weights, not_run)


def _write_report(
    folder: Path, facts: ModelFacts, shards: ShardSet, random_weights: Path | None, not_run: Mapping[str, str]
) -> Path:
    from pipeline.evaluate.registry import TASKS

    order = list(TASKS)
    measured = read_measured(folder, random_weights or folder / RANDOM_WEIGHTS, facts, shards)
    tasks = sorted(measured.tasks, key=lambda task: order.index(task) if task in order else len(order))
    sections = [
        _header(facts, shards),
        _not_run(not_run),
        _numbers(tasks, measured),
        _curve(folder, facts, shards, measured.tasks),
        *(section(measured.tasks[task], folder) for task in tasks),
        _beside_the_paper(tasks, measured.tasks, shards),
        _how_to_read(facts, measured.tasks, shards),
        _commands(facts, measured),
    ]
    page = folder / REPORT
    write_page(page, f"Image GPT: {shards.name}", sections)
    write_results(folder, facts, shards, measured, list(not_run))
    return page


def _header(facts: ModelFacts, shards: ShardSet) -> str:
    entries = {
        "Parameters": f"{facts.parameters:,}",
        "Layers × width × heads": f"{facts.layers} × {facts.width} × {facts.heads}",
        "Block": "the paper's (RMSNorm, no biases)" if facts.block == "igpt" else "stock GPT-2",
        "Objective": {"next_color": "the next colour", "masked_color": "hidden colours (BERT)"}[facts.objective],
        "Pictures": f"{facts.resolution} × {facts.resolution}, {shards.colors} colours",
        "Training step": _step(facts),
        "Pictures seen in training": _count(facts.images_seen),
        "Trained on": facts.source or "not recorded",
        "Measured on": f"{shards.name}, {len(shards.classes)} classes",
        "Shard set": shards.digest[:12],
        "Palette": facts.palette_sha256[:12],
        "Model": facts.digest[:12],
    }
    cells = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in entries.items())
    return (
        f"<h1>Image GPT on {escape(shards.name)}</h1>\n"
        '<p class="lead">A transformer that reads pictures as sequences of palette colours and learned to predict '
        "them: what it came to, measured on pictures it was not trained on.</p>\n"
        f"{_unfinished(facts)}"
        f'<dl class="facts">{cells}</dl>'
    )


def _unfinished(facts: ModelFacts) -> str:
    words = unfinished(facts.checkpoint_step, facts.planned_steps)
    return f"<p><strong>{escape(words)}</strong></p>\n" if words else ""


def _step(facts: ModelFacts) -> str:
    planned = "" if facts.checkpoint_step is None or facts.planned_steps is None else f" of {facts.planned_steps:,}"
    return _count(facts.checkpoint_step) + planned


def _not_run(tasks: Mapping[str, str]) -> str:
    return (
        note(f"Asked for and not run yet: {', '.join(tasks.values())}. The same command goes on with them.")
        if tasks
        else ""
    )


def _count(number: int | None) -> str:
    return "not recorded" if number is None else f"{number:,}"


def _numbers(tasks: list[str], measured: Measured) -> str:
    """Every task's numbers, beside the same of initial weights and of classifiers that do without the model."""
    rows = []
    for task in tasks:
        result = measured.tasks[task]
        untaught = {row.name: row.text for row in _headlines_if_there(task, measured.random_weights)}
        for row in headlines_of(result):
            baselines = [percent(result.get(key)) for key in BASELINES.values()]
            rows.append([row.name, row.detail, row.text, untaught.get(row.name, MISSING), *baselines])
    if not rows:
        return ""
    head = ["Measure", "Chosen", "This model", "Random weights", *BASELINES]
    kept = [place for place in range(len(head)) if place < 3 or any(row[place] != MISSING for row in rows)]
    return (
        "<h2>The numbers</h2>\n"
        + table([head[place] for place in kept], [[row[place] for place in kept] for row in rows], text=2)
        + note(
            "Accuracies on the test split; ± is the binomial standard error, or the deviation where a measure is "
            "repeated. Layers, strengths, rates and k were chosen on the validation split, and the test split was "
            "looked at once. Random weights: the same architecture with initial weights, measured with --weights "
            "random. Raw pixels and colour histograms go through the same classifier without the model."
        )
    )


def _headlines_if_there(task: str, results: Results) -> list[Headline]:
    return headlines_of(results[task]) if task in results else []


def _curve(folder: Path, facts: ModelFacts, shards: ShardSet, tasks: Results) -> str:
    if facts.metrics is None:
        return ""
    rows = read_metrics(facts.metrics)
    if not has_losses(rows):
        return ""
    path = folder / CURVE
    draw_curve(rows, shards.colors, tasks.get("density"), path)
    caption = (
        "Loss on the training split (mean and range of neighbouring steps) and on the validation split. Below a dashed "
        "line the model knows more than that baseline, as the density task scored it."
    )
    return f"<h2>Training</h2>\n{figure(path, 'training curve', caption)}"


def _beside_the_paper(tasks: list[str], found: Results, shards: ShardSet) -> str:
    """Groups of published numbers, ours on top of those that we measured too."""
    ours: dict[str, list[Headline]] = {}
    for task in tasks:
        for row in headlines_of(found[task]):
            ours.setdefault(row.measure, []).append(row)
    measures = [measure for measure in dict.fromkeys(row.measure for row in PUBLISHED) if measure in ours]
    if not measures:
        return ""
    dataset = f"{shards.name} {shards.resolution}x{shards.resolution}"
    lines = ['<tr><th>Dataset</th><th>System</th><th class="number">Value</th><th>Source</th></tr>']
    for measure in [*measures, RELATED]:
        lines.append(f'<tr class=group><th colspan="4">{escape(measure)}</th></tr>')
        lines += [
            _line(dataset, f"this model: {row.name}", row.text, "measured here", " class=ours")
            for row in ours.get(measure, [])
        ]
        lines += [_line(*row[1:]) for row in PUBLISHED if row.measure == measure]
    return f'<h2>Beside the published numbers</h2>\n<div class="scroll"><table>{"".join(lines)}</table></div>\n' + note(
        "Numbers compare only on the same dataset, and losses only under the same palette too; the others stand here "
        "for scale. Published probes use features learned on ImageNet."
    )


def _line(dataset: str, system: str, value: str, source: str, mark: str = "") -> str:
    return (
        f"<tr{mark}><td>{escape(dataset)}</td><td>{escape(system)}</td>"
        f'<td class="number">{escape(value)}</td><td>{escape(source)}</td></tr>'
    )


def _how_to_read(facts: ModelFacts, results: Results, shards: ShardSet) -> str:
    seen = "" if facts.images_seen is None else f" and saw {facts.images_seen:,} pictures"
    sentences = [
        "The paper's smallest model has 76 million parameters and saw 128 million pictures.",
        f"This one has {facts.parameters:,}{seen}.",
        *_known_by_density(results.get("density", {})),
        "That a middle or late layer does better than the first, and trained weights better than random ones, says "
        "that training built something; whether it also beats a colour histogram depends on how far colour alone gives "
        "the class away, which is why those baselines are printed.",
    ]
    if shards.name == "photographs":
        sentences.append(
            "The classes are windows of a few photographs, and test windows of one photograph resemble each other: the "
            "true uncertainty of an accuracy is larger than its binomial error."
        )
    return f"<h2>How to read this</h2>\n<p>{' '.join(sentences)}</p>"


def _known_by_density(density: dict[str, Any]) -> list[str]:
    """What the model's nats say beside those of counts."""
    if not density or density["masked"]:
        return []
    if density["nats_per_color"] >= density["bigram_nats_per_color"]:
        return ["It predicts colours no better than the previous colour alone does: trained for longer, it would."]
    if density["nats_per_color"] >= density["left_times_above_nats_per_color"]:
        return [
            "It beats what the previous colour tells, not what two neighbours tell: it continues colours, no objects."
        ]
    return ["It beats what two neighbouring colours tell, so it has learned structure beyond them."]


def _commands(facts: ModelFacts, measured: Measured) -> str:
    parts = ["<h2>Commands</h2>", *(f"<pre>{escape(command)}</pre>" for command in commands(facts, measured))]
    if measured.others:
        parts.append(note(f"Left out, because they are of another model or shard set: {', '.join(measured.others)}."))
    return "\n".join(parts)
