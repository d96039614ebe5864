"""report.html: what was measured, in one file that needs no other."""

import base64
import json
import math
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from data_prep.files import read_json, written_aside
from data_prep.shards import ShardSet
from pipeline.evaluate.provenance import ModelFacts
from pipeline.evaluate.published import NATS, PROBE, PUBLISHED

REPORT = "report.html"
TEMPLATE = Path(__file__).with_name("report_template.html")
CURVE_POINTS = 120

Results = dict[str, dict[str, Any]]
"""Task name to the content of its JSON."""


def write_report(results: Path, facts: ModelFacts, shards: ShardSet) -> Path:
    """Writes RESULTS/report.html from the results that stand in the folder, and returns its path.

    Results of another model or shard set are left out, and the report says so.
    """
    found, others = read_results(results, facts, shards)
    sections = [
        _header(facts, shards),
        _numbers(found),
        _curve(results, facts, found),
        _completions(results, found),
        _probe(results, found),
        _beside_the_paper(found, shards),
        _what_it_shows(facts),
        _commands(facts, found, others),
    ]
    page = Template(TEMPLATE.read_text()).substitute(
        title=f"Image GPT: {escape(shards.name)}", body="\n".join(section for section in sections if section)
    )
    path = results / REPORT
    with written_aside(path) as aside:
        aside.write_text(page)
    return path


def read_results(results: Path, facts: ModelFacts, shards: ShardSet) -> tuple[Results, list[str]]:
    """Results of this model on this shard set by task, and the names of files that are of others."""
    found: Results = {}
    others = []
    for path in sorted(results.glob("*.json")):
        result = read_json(path)
        if not isinstance(result, dict) or "inputs_digest" not in result:
            continue  # a file of the user's
        if (result["model_digest"], result["dataset_digest"]) == (facts.digest, shards.digest):
            found[result["task"]] = result
        else:
            others.append(path.name)
    return found, others


def _header(facts: ModelFacts, shards: ShardSet) -> str:
    entries = {
        "Parameters": f"{facts.parameters:,}",
        "Layers × width × heads": f"{facts.layers} × {facts.width} × {facts.heads}",
        "Block": "the paper's (RMSNorm, no biases)" if facts.block == "igpt" else "stock GPT-2",
        "Pictures": f"{facts.resolution} × {facts.resolution}, {shards.colors} colours",
        "Training step": _count(facts.checkpoint_step),
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
        '<p class="lead">A transformer that reads pictures as sequences of palette colours and learned to predict the '
        "next one: what it came to, measured on pictures it was not trained on.</p>\n"
        f'<dl class="facts">{cells}</dl>'
    )


def _count(number: int | None) -> str:
    return "not recorded" if number is None else f"{number:,}"


def _numbers(found: Results) -> str:
    tables = []
    if "density" in found:
        tables.append(_density_table(found["density"]))
    if "linear_probe" in found:
        tables.append(_probe_table(found["linear_probe"]))
    return "<h2>The numbers</h2>\n" + "\n".join(tables) if tables else ""


def _density_table(density: dict[str, Any]) -> str:
    model = ("This model", density["nats_per_color"], True)
    baselines = [
        ("Every colour alike", density["uniform_nats_per_color"], False),
        ("Colour frequencies", density["unigram_nats_per_color"], False),
        ("Given the previous colour (bigram)", density["bigram_nats_per_color"], False),
        ("Given the colours to the left and above (product)", density["left_times_above_nats_per_color"], False),
    ]
    rows = "".join(
        f'<tr{" class=ours" if ours else ""}><td>{name}</td><td class="number">{nats:.4f}</td>'
        f'<td class="number">{nats / math.log(2):.4f}</td></tr>'
        for name, nats, ours in sorted([model, *baselines], key=lambda row: row[1])
    )
    return (
        '<table><tr><th>Predicting colours</th><th class="number">nats per colour</th>'
        f'<th class="number">bits per colour</th></tr>{rows}</table>'
        f'<p class="note">Mean over {density["images"]:,} pictures of {escape(density["split"])}, standard error '
        f"{density['nats_standard_error']:.4f} nats; lower is better. The baselines count the whole train split.</p>"
    )


def _probe_table(probe: dict[str, Any]) -> str:
    rows = [
        (
            f"This model, layer {probe['best_layer']} of {len(probe['valid_accuracy_by_layer']) - 1}",
            "test_accuracy",
            True,
        ),
        ("Colour histogram", "color_histogram_test_accuracy", False),
        ("Raw pixels", "raw_pixel_test_accuracy", False),
        ("Always the commonest class", "majority_class_test_accuracy", False),
    ]
    cells = "".join(
        f'<tr{" class=ours" if ours else ""}><td>{name}</td><td class="number">{_percent(probe[key])}</td></tr>'
        for name, key, ours in sorted(rows, key=lambda row: -probe[row[1]])
    )
    return (
        '<table><tr><th>Telling classes apart, linear probe</th><th class="number">test accuracy</th></tr>'
        f"{cells}</table>"
        f'<p class="note">{probe["classes"]} classes, {probe["test_images"]:,} test pictures, binomial standard error '
        f"{_percent(probe['test_standard_error'])}. Layer and regularisation were chosen on {probe['valid_images']:,} "
        f"validation pictures; the test pictures were looked at once.</p>"
    )


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _curve(results: Path, facts: ModelFacts, found: Results) -> str:
    if facts.metrics is None:
        return ""
    rows = [json.loads(line) for line in facts.metrics.read_text().splitlines()]
    if not any(math.isfinite(row.get("loss", math.nan)) for row in rows):
        return ""
    path = results / "training.png"
    draw_curve(rows, facts, found.get("density"), path)
    caption = (
        "Loss on the training split (mean and range of neighbouring steps) and on the validation split. Below a dashed "
        "line the model knows more than that baseline (baselines as scored in the table above)."
    )
    return f"<h2>Training</h2>\n{_figure(path, 'training curve', caption)}"


def draw_curve(rows: list[dict[str, Any]], facts: ModelFacts, density: dict[str, Any] | None, path: Path) -> None:
    """Draws metrics.jsonl's losses over the pictures seen, with the baselines of `density` if it was measured."""
    from pipeline.evaluate.figures import ACCENT, BASELINES, label_line, new_figure, save_figure

    training = [row for row in rows if "loss" in row]
    validation = [row for row in rows if "valid_loss" in row]
    images, low, mean, high = summarised(training)
    figure, axes = new_figure()
    axes.fill_between(images, low, high, color=ACCENT, alpha=0.18, linewidth=0)
    axes.plot(images, mean, color=ACCENT, linewidth=1.6, label="training")
    if validation:
        axes.plot(
            [row["images"] for row in validation], [row["valid_loss"] for row in validation],
            "o-", color="#111111", markersize=4, linewidth=1, label="validation",
        )  # fmt: skip
    label_line(axes, density["uniform_nats_per_color"] if density else math.log(512), "uniform", BASELINES[1])
    if density:
        label_line(axes, density["unigram_nats_per_color"], "colour frequencies", BASELINES[0])
        label_line(axes, density["bigram_nats_per_color"], "previous colour", BASELINES[2])
    axes.set_xlabel("pictures seen")
    axes.set_ylabel("loss (nats per colour)")
    axes.xaxis.set_major_formatter(lambda value, _position: f"{value:,.0f}")
    axes.set_xlim(left=0)
    axes.legend(frameon=False, loc="center right")
    with written_aside(path) as aside:
        save_figure(figure, aside)


def summarised(rows: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pictures seen, and least, mean and greatest loss, of at most CURVE_POINTS groups of neighbouring steps.

    Steps without a finite loss are left out.
    """
    finite = np.array([(row["images"], row["loss"]) for row in rows if math.isfinite(row["loss"])])  # (steps, 2)
    groups = np.array_split(finite, min(CURVE_POINTS, len(finite)))
    images = np.array([group[:, 0].mean() for group in groups])
    low, mean, high = (np.array([reduce(group[:, 1]) for group in groups]) for reduce in (np.min, np.mean, np.max))
    return images, low, mean, high


def _completions(results: Path, found: Results) -> str:
    path = results / "completions.png"
    if "completions" not in found or not path.is_file():
        return ""
    shown = found["completions"]
    caption = (
        f"The first column is what the model was given, the last the whole picture; between them are "
        f"{shown['samples']} samples at temperature {shown['temperature']:g}. Pictures of {escape(shown['split'])} "
        "chosen at random; no sample was picked by hand."
    )
    return f"<h2>Completions</h2>\n{_figure(path, 'completions of half pictures', caption)}"


def _probe(results: Path, found: Results) -> str:
    path = results / "linear_probe.png"
    if "linear_probe" not in found or not path.is_file():
        return ""
    layer = found["linear_probe"]["best_layer"]
    caption = (
        "A linear classifier on the mean feature of each layer, trained on "
        f"{found['linear_probe']['train_images']:,} labelled pictures; the model itself never saw a label. The circle "
        f"marks layer {layer}, which was measured on the test split."
    )
    return f"<h2>What each layer knows</h2>\n{_figure(path, 'validation accuracy by layer', caption)}"


def _figure(path: Path, alternative: str, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img alt="{alternative}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _beside_the_paper(found: Results, shards: ShardSet) -> str:
    ours = []
    if "density" in found:
        ours.append((NATS, f"{found['density']['nats_per_color']:.4f}"))
    if "linear_probe" in found:
        ours.append((PROBE, _percent(found["linear_probe"]["test_accuracy"])))
    if not ours:
        return ""
    size = f"{shards.name} {shards.resolution}x{shards.resolution}"
    rows = []
    for measure, value in ours:
        rows.append(f'<tr class=group><th colspan="4">{escape(measure)}</th></tr>')
        entries = [(size, "this model", value, "measured here", " class=ours")]
        entries += [(*row[1:], "") for row in PUBLISHED if row.measure == measure]
        for dataset, system, number, source, mark in entries:
            rows.append(
                f"<tr{mark}><td>{escape(dataset)}</td><td>{escape(system)}</td>"
                f'<td class="number">{escape(number)}</td><td>{escape(source)}</td></tr>'
            )
    return (
        "<h2>Beside the published numbers</h2>\n"
        '<div class="scroll"><table><tr><th>Dataset</th><th>System</th><th class="number">Value</th>'
        f"<th>Source</th></tr>{''.join(rows)}</table></div>\n"
        '<p class="note">Numbers compare only on the same dataset, and losses only under the same palette too; '
        "the others stand here for scale. Published probes use features learned on ImageNet.</p>"
    )


def _what_it_shows(facts: ModelFacts) -> str:
    seen = "" if facts.images_seen is None else f" and saw {facts.images_seen:,} pictures"
    return (
        "<h2>How to read this</h2>\n"
        f"<p>The paper's smallest model has 76 million parameters and saw 128 million pictures. This one has "
        f"{facts.parameters:,}{seen}. A model of well under a million parameters and some ten thousand pictures learns "
        "local structure: it continues colours, gradients and edges, and beats what one neighbouring colour tells. It "
        "draws no objects, and its probe shows texture and colour more than meaning. That a middle or late layer does "
        "better than the first says that training built something; whether it also beats a colour histogram depends on "
        "how far colour alone gives the class away, which is why that baseline is printed.</p>\n"
        "<p>Where the classes are windows of a few photographs, test windows of one photograph resemble each other, so "
        "the true uncertainty of an accuracy is larger than its binomial error.</p>"
    )


def _commands(facts: ModelFacts, found: Results, others: list[str]) -> str:
    commands = [*facts.training_commands, *dict.fromkeys(result["command"] for result in found.values())]
    parts = ["<h2>Commands</h2>", *(f"<pre>{escape(command)}</pre>" for command in commands)]
    if others:
        names = escape(", ".join(others))
        parts.append(f'<p class="note">Left out, because they are of another model or shard set: {names}.</p>')
    return "\n".join(parts)
