"""What `scaling` prints and writes: tables, the page, the figures, and the numbers.

scaling.json is written last. It has `format`, `version`, `points` (run, parameters, images, flops, valid_loss, fitted),
`law` and `exponents` (value, low, high of each number), `held_out`, `predictions`, `optima`, `accuracies` and `notes`.
Losses are in nats per token, D is in images, intervals are of 95%.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.common.files import atomic_write, write_json
from pipeline.results.text import MISSING, number, percent
from pipeline.scaling.accuracy import Probed, rank_correlation
from pipeline.scaling.bootstrap import FEWEST, Fitted, Interval
from pipeline.scaling.budget import Family, Optimum
from pipeline.scaling.figures import draw_accuracy, draw_isoflops, draw_loss_by_flops, draw_loss_by_images, short
from pipeline.scaling.law import PARAMETERS, Law, at_bound, residuals
from pipeline.scaling.runs import Selected

logger = logging.getLogger(__name__)

FORMAT, VERSION = "image-gpt-scaling", 1
NUMBERS, PAGE = "scaling.json", "scaling.md"
BY_FLOPS, BY_IMAGES, ISOFLOPS, ACCURACY = "loss_by_flops.png", "loss_by_images.png", "isoflops.png", "accuracy.png"
FAR = 10.0
"""FLOPs over those of the largest run from which a note warns of the extrapolation."""
MISFIT = 0.01
"""Root mean square of the residuals of log L from which a note proposes to exclude losses."""
KINDS = {"decayed": "ends of decaying learning rates", "constant": "constant learning rates after the warm-up"}


@dataclass(frozen=True)
class HoldOut:
    """The largest run, predicted by a law that was fitted without it."""

    run: str
    parameters: int
    images: int
    times_flops: float
    """Its training FLOPs over those of the largest run in the fit."""
    predicted: Interval
    measured: float
    """At its most images, nats per token."""
    error: float
    """Predicted over measured, minus 1."""
    mean_error: float
    """Mean of the absolute errors over all points that are excluded."""
    also: list[str]
    """Other runs that are excluded: they share steps with it, such as branches of its trunk."""


@dataclass(frozen=True)
class Prediction:
    """The loss that a configuration will reach."""

    config: str
    parameters: int
    images: int
    flops: float
    loss: Interval
    times_flops: float
    """Its training FLOPs over those of the largest run."""
    same_schedule: bool
    """Whether its learning rate decays if those of the fit do."""


@dataclass(frozen=True)
class Study:
    """All results of the command."""

    selected: Selected
    fitted: Fitted
    held_out: HoldOut
    predictions: list[Prediction]
    optima: list[Optimum]
    accuracies: list[Probed]


class Table(NamedTuple):
    """A table of text."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def hold_out_of(fitted: Fitted, rest: Selected, largest: Selected) -> HoldOut:
    """The errors of a law on the points of the run that it was fitted without."""
    points, last = largest.points, int(np.argmax(largest.points.images))
    parameters, images, measured = (float(values[last]) for values in (points.parameters, points.images, points.losses))
    predicted = fitted.prediction(parameters, images)
    errors = np.exp(-residuals(fitted.law, points)) - 1
    own = int(points.runs[last])
    also = [largest.runs[run].name for run in np.unique(points.runs) if run != own]
    return HoldOut(
        largest.runs[own].name, int(parameters), int(images),
        float(largest.flops().max() / rest.flops().max()), predicted, measured, float(errors[last]),
        float(np.abs(errors).mean()), also,
    )  # fmt: skip


def write_study(study: Study, sizes: Family, out: Path) -> None:
    """Prints the results and writes all files, the numbers last."""
    notes = [*study.selected.notes, *_notes(study)]
    facts, tables = _facts(study), _tables(study)
    for line in [*facts, *map(_as_text, tables), *(f"note: {note}" for note in notes)]:
        print(line)
    out.mkdir(parents=True, exist_ok=True)
    for name in (NUMBERS, ACCURACY):
        (out / name).unlink(missing_ok=True)  # of an earlier fit, which the other files no longer match
    law = study.fitted.law
    draw_loss_by_flops(study.selected, law, sizes, out / BY_FLOPS)
    draw_loss_by_images(study.selected, law, out / BY_IMAGES)
    draw_isoflops(study.selected, law, sizes, out / ISOFLOPS)
    if study.accuracies:
        draw_accuracy(study.accuracies, out / ACCURACY)
    with atomic_write(out / PAGE) as temporary:
        temporary.write_text(_page(facts, tables, notes, bool(study.accuracies)))
    write_json(out / NUMBERS, _numbers(study, notes))
    logger.info(f"figures, {PAGE} and {NUMBERS} are in {out}")


def _facts(study: Study) -> list[str]:
    """The points, the held-out run, the exponents of the compute-optimal frontier, and the accuracies."""
    selected, points, held = study.selected, study.selected.points, study.held_out
    counts = sorted({run.parameters for run in selected.runs})
    images = [f"{int(count):,}" for count in (points.images.min(), points.images.max())]
    size, data = (study.fitted.interval(of) for of in (size_exponent, data_exponent))
    facts = [
        f"{len(points)} losses of {len(selected.runs)} runs and {len(counts)} sizes, {short(counts[0])} to "
        f"{short(counts[-1])} parameters, {' to '.join(images)} images; {KINDS[selected.kind]}",
        f"the law misses them by {_spread(study):.2%} (root mean square)",
        f"held out: {held.run}, {short(held.parameters)} parameters, {held.images:,} images, {held.times_flops:.3g} "
        f"times the FLOPs of the largest run in the fit: predicted {_with_ends(held.predicted)}, measured "
        f"{held.measured:.4f}, error {held.error:+.2%}"
        + (f"; {', '.join(held.also)} excluded with it, which share its steps" if held.also else "")
        + (f" (mean over its losses {held.mean_error:.2%})" if selected.kind == "constant" else ""),
        f"compute-optimal: parameters grow as FLOPs^{_with_ends(size, 2)}, images as FLOPs^{_with_ends(data, 2)}",
    ]
    for source, name in (("probe", "the runs' probes"), ("evaluate", "results of linear_probe")):
        own = [one for one in study.accuracies if one.source == source]
        if own:
            correlation = rank_correlation(own)
            shown = "" if correlation is None else f", rank correlation with the loss {correlation:.2f}"
            facts.append(f"accuracy: {len(own)} of {name}, best {percent(max(one.accuracy for one in own))}{shown}")
    return facts


def _spread(study: Study) -> float:
    """The root mean square of the residuals of log L."""
    return float(np.sqrt((residuals(study.fitted.law, study.selected.points) ** 2).mean()))


def size_exponent(law: Law) -> float:
    """The compute-optimal number of parameters grows as FLOPs to this power, if FLOPs grow as N times D."""
    return law.beta / (law.alpha + law.beta)


def data_exponent(law: Law) -> float:
    """The compute-optimal number of images grows as FLOPs to this power."""
    return law.alpha / (law.alpha + law.beta)


def _with_ends(value: Interval, digits: int = 4) -> str:
    return f"{value.value:.{digits}f} ({value.shown(lambda end: f'{end:.{digits}f}')})"


def _tables(study: Study) -> list[Table]:
    law = [
        [name, number(own.value), number(own.low), number(own.high)]
        for name, own in _law(study.fitted).items()
    ]  # fmt: skip
    tables = [Table("L(N, D) = E + A / N^alpha + B / D^beta", ["", "value", "95% from", "to"], law)]
    if study.predictions:
        rows = [
            [
                one.config, f"{one.parameters:,}", f"{one.images:,}", f"{one.flops:.2e}", f"{one.loss.value:.4f}",
                number(one.loss.low), number(one.loss.high), f"{one.times_flops:.3g}",
            ]
            for one in study.predictions
        ]  # fmt: skip
        head = ["predicted", "parameters", "images", "FLOP", "loss", "95% from", "to", "x largest run"]
        tables.append(Table("Predictions", head, rows))
    if study.optima:
        rows = [
            [
                f"{one.budget:.3g} {one.unit}", *_counts(one.parameters), *_counts(one.images),
                f"{one.loss.value:.4f}", one.loss.shown(lambda end: f"{end:.4f}"),
                f"{one.nearest.model.layers} x {one.nearest.model.width}", short(one.nearest.parameters),
                short(one.nearest_images),
            ]
            for one in study.optima
        ]  # fmt: skip
        head = ["budget", "parameters", "95%", "images", "95%", "loss", "95%", "layers x width", "has", "images"]
        if any(one.training for one in study.optima):
            head.append("trained with")
            rows = [[*row, one.training or MISSING] for row, one in zip(rows, study.optima, strict=True)]
        tables.append(Table("Compute-optimal", head, rows))
    return tables


def _counts(count: Interval) -> tuple[str, str]:
    return short(count.value), count.shown(short)


def _law(fitted: Fitted) -> dict[str, Interval]:
    return {name: fitted.interval(lambda law, name=name: getattr(law, name)) for name in _names(Law)}  # type: ignore[misc]


def _names(dataclass_: type) -> list[str]:
    return [field.name for field in fields(dataclass_)]


def _notes(study: Study) -> list[str]:
    """What limits the numbers."""
    law, notes, missed = study.fitted.law, [], _spread(study)
    if missed > MISFIT:
        notes.append(
            f"the law misses the losses by {missed:.2%}: if the early ones deviate in {BY_IMAGES}, exclude them with "
            f"--min_images."
        )
    if not study.fitted.resamples:
        notes.append(
            f"no interval: {len(study.selected.points)} points; 95% intervals need at least {FEWEST + PARAMETERS}."
        )
    for name in at_bound(law, study.selected.points):
        notes.append(f"{name} is at the bound of the search, {getattr(law, name):.3g}: the runs do not determine it.")
    for one in study.predictions:
        if not one.same_schedule:
            lower = "a lower" if study.selected.kind == "constant" else "a higher"
            notes.append(f"{one.config} has another schedule than the fitted losses; expect {lower} loss.")
        if one.times_flops > FAR:
            notes.append(
                f"{one.config} has {one.times_flops:.3g} times the FLOPs of the largest run: far to extrapolate."
            )
    for best in study.optima:
        if best.at_end:
            notes.append(f"the optimum for {best.budget:.3g} {best.unit} is at the end of the sizes compared.")
    return notes


def _as_text(table: Table) -> str:
    """The table with aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(table.head, *table.rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        numbers = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)][1:]
        return "  " + "  ".join([cells[0].ljust(widths[0]), *numbers]).rstrip()

    return "\n".join(["", table.title, line(table.head), *map(line, table.rows), ""])


def _page(facts: Sequence[str], tables: Sequence[Table], notes: Sequence[str], accuracy: bool) -> str:
    """The same in Markdown, with the figures."""
    parts = ["# Scaling law", *(f"- {fact}" for fact in facts), ""]
    for table in tables:
        rows = [table.head, ["---"] * len(table.head), *table.rows]
        parts += [f"## {table.title.replace('*', chr(92) + '*')}", "", *(f"| {' | '.join(row)} |" for row in rows), ""]
    captions = {
        BY_FLOPS: "Validation loss against training FLOPs; colors are sizes, lines the law, dashed its envelope",
        BY_IMAGES: "Validation loss against images seen",
        ISOFLOPS: "Loss of the law against model size at equal FLOPs, with the minima",
    } | ({ACCURACY: "Accuracy against validation loss"} if accuracy else {})
    parts += [f"![{caption}]({name})\n\n*{caption}.*\n" for name, caption in captions.items()]
    return "\n".join([*parts, *(f"- {note}" for note in notes)]).rstrip() + "\n"


def _numbers(study: Study, notes: Sequence[str]) -> dict[str, Any]:
    selected, law = study.selected, study.fitted.law
    points, flops = selected.points, selected.flops()
    return {
        "format": FORMAT,
        "version": VERSION,
        "kind": selected.kind,
        "points": [
            {
                "run": selected.runs[run].name, "parameters": int(parameters), "images": int(images),
                "flops": float(cost), "valid_loss": float(loss), "fitted": float(law.loss(parameters, images)),
            }
            for run, parameters, images, cost, loss in zip(
                points.runs, points.parameters, points.images, flops, points.losses, strict=True
            )
        ],
        "law": {name: asdict(own) for name, own in _law(study.fitted).items()},
        "exponents": {
            "parameters": asdict(study.fitted.interval(size_exponent)),
            "images": asdict(study.fitted.interval(data_exponent)),
        },
        "held_out": asdict(study.held_out),
        "predictions": [asdict(one) for one in study.predictions],
        "optima": [asdict(one) for one in study.optima],
        "accuracies": [asdict(one) for one in study.accuracies],
        "notes": list(notes),
    }  # fmt: skip
