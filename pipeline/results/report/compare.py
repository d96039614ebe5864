"""`python -m pipeline compare RESULTS...`: accuracy against validation loss over checkpoints, as figure 3 of the paper.

A RESULTS folder that contains step-*/, one folder per checkpoint as slurm/evaluate.sh writes them, becomes a line; a
folder with the results of a single model becomes a point. The loss is the result of the density task on `valid` if all
checkpoints have it, because it then uses the same images and precision for all. Otherwise it is the loss that each run
logged at the checkpoint's step. The default accuracy is on the validation split, since the comparison is used to choose
a checkpoint.

A results.json that can't be read, such as a later version's, is excluded, and the page names it.

Writes compare.html, compare.png and compare.json: `format`, `version`, `task`, `accuracy` (valid or test), `loss`
(density or run), and `models`, each with `name` and `points`: step, images_seen, parameters, valid_loss (nats per
color), valid_accuracy, test_accuracy, best_layer.
"""

import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.common.command_line import new_parser, parse
from data_prep.common.files import read_json, write_json
from pipeline.results.figures import ACCENT, BASELINES, new_figure, save_figure
from pipeline.results.report.html import write_page
from pipeline.results.schema import FORMAT, RESULTS, VERSION
from pipeline.results.text import MISSING, percent, words

logger = logging.getLogger(__name__)

PAGE, FIGURE, NUMBERS = "compare.html", "compare.png", "compare.json"
COMPARISON_FORMAT, COMPARISON_VERSION = "image-gpt-comparison", 1
LOSSES = {
    "density": "the density task on the validation split",
    "run": "logged by the runs at the checkpoint's step",
}
WITHOUT_EFFECT = ("batch_size",)
"""Options that may differ between models, since they change only rounding."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """What to compare, and where to write the comparison."""

    out: Path
    """The folder for the page, the figure and the numbers."""
    task: str = "linear_probe"
    """The task whose accuracy is shown."""
    accuracy: Literal["valid", "test"] = "valid"
    """The split on which the accuracy was measured."""


@dataclass(frozen=True)
class Point:
    """One checkpoint."""

    step: int | None
    images_seen: int | None
    parameters: int
    valid_loss: float
    valid_accuracy: float | None
    test_accuracy: float | None
    best_layer: int | None


@dataclass(frozen=True)
class Line:
    """One model's checkpoints, in the order of their steps."""

    name: str
    points: list[Point]


def compare_command(arguments: list[str]) -> int:
    """Writes the comparison. Raises ValueError for invalid input."""
    parser = new_parser("python -m pipeline compare", "Compares checkpoints: accuracy against validation loss.")
    parser.add_argument(
        "results", nargs="+", type=Path, help="results folders: RESULTS with step-*/ inside, or of one model"
    )
    parser.add_class_arguments(Command)
    values = vars(parse(parser, arguments))
    command = Command(**{name: values[name] for name in Command.__dataclass_fields__})
    if command.out.exists() and not command.out.is_dir():
        raise ValueError(f"--out is {command.out}, which is a file; it must be a folder.")
    excluded: list[str] = []
    named = _named(values["results"])
    measured = {name: read_checkpoints(path, command.task, excluded) for name, path in named.items()}
    lines, loss = lines_of(measured, command.task)
    write_comparison(lines, loss, command, _images(measured, command.task), excluded)
    logger.info(f"comparison: {command.out / PAGE}")
    return os.EX_OK


def _named(paths: list[Path]) -> dict[str, Path]:
    """A name for each line: the name of the folder, or its path if names are equal."""
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"{max(names, key=names.count)} is given twice; give each results folder once.")
    return dict(zip(names, paths, strict=True))


def read_checkpoints(folder: Path, task: str, excluded: list[str]) -> list[dict[str, Any]]:
    """The results.json of each checkpoint that has results of `task`. Raises ValueError if there is none.

    Those that can't be read are logged and added to `excluded`, with the reasons.
    """
    files = sorted(folder.glob(f"step-*/{RESULTS}")) or [folder / RESULTS]
    found = []
    for file in files:
        if not file.is_file():
            raise ValueError(f"{folder} has no {RESULTS} and no step-*/{RESULTS}; give a folder that evaluate wrote.")
        results, reason = _read(file, task)
        if reason is None:
            found.append(results | {"file": file})
        else:
            logger.warning(f"{file.parent} {reason}; it is excluded")
            excluded.append(f"{folder.name}/{file.parent.name} {reason}")
    if not found:
        raise ValueError(
            f"{folder} has no checkpoint with results of {task} that can be read; evaluate with --tasks {task}, or set "
            f"another --task."
        )
    return sorted(found, key=lambda results: results["model"]["checkpoint_step"] or 0)


def _read(file: Path, task: str) -> tuple[dict[str, Any], str | None]:
    """The content of results.json, and why it can't be compared; None if it can.

    Raises ValueError if the file is something else.
    """
    try:
        results = read_json(file)
    except ValueError as error:
        return {}, f"has a damaged {file.name} ({str(error).removeprefix(f'{file} ').rstrip('.')})"
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        raise ValueError(f"{file} was not written by `python -m pipeline evaluate`; give a folder that it wrote.")
    return results, _why_unreadable(results, task)


def _why_unreadable(results: dict[str, Any], task: str) -> str | None:
    """Why the results of a checkpoint can't be compared; None if they can."""
    version = results.get("version", 0)
    if not isinstance(version, int) or version > VERSION:
        return f"has results of a later version ({version}; this program reads up to {VERSION})"
    try:
        if task not in results["tasks"]:
            return f"has no results of {task} yet"
        for name in {task, "density"} & results["tasks"].keys():
            _conditions(results["tasks"][name])
        if not isinstance(results["dataset"]["digest"], str):
            return "has results of another version (the digest of its dataset is not a text)"
        _point(results, task, 0.0)
        for kind in LOSSES:
            _loss(results, kind)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        return f"has results of another version ({error!r})"
    return None


def _images(measured: dict[str, list[dict[str, Any]]], task: str) -> str:
    """A sentence with the numbers of images that the accuracies are of; "" if a result does not record them."""
    every = [results["tasks"][task] for checkpoints in measured.values() for results in checkpoints]
    counts = [
        f"{every[0][f'{split}_images']:,} {name} images"
        for split, name in SPLITS.items()
        if len({result.get(f"{split}_images") for result in every}) == 1 and f"{split}_images" in every[0]
    ]
    return f" Measured on {' and '.join(counts)}." if counts else ""


def lines_of(measured: dict[str, list[dict[str, Any]]], task: str) -> tuple[list[Line], str]:
    """The lines, and the key in LOSSES of their loss.

    Raises ValueError if the checkpoints were measured on different shard sets or with different options, or if
    some have no validation loss.
    """
    every = [results for checkpoints in measured.values() for results in checkpoints]
    loss = next((kind for kind in LOSSES if all(_loss(results, kind) is not None for results in every)), None)
    if loss is None:
        lacking = next(results["file"].parent for results in every if _loss(results, "run") is None)
        raise ValueError(
            f"{lacking} has no validation loss: its run did not validate at that step, or its weights are an average, "
            f"and not every checkpoint has density on valid; evaluate all with --tasks density --density.split valid."
        )
    _check_comparable(every, [task, "density"] if loss == "density" else [task])
    lines = [
        Line(name, [_point(results, task, _loss(results, loss)) for results in checkpoints])
        for name, checkpoints in measured.items()
    ]
    return lines, loss


def _check_comparable(every: list[dict[str, Any]], tasks: list[str]) -> None:
    first = every[0]
    for results in every[1:]:
        if results["dataset"]["digest"] != first["dataset"]["digest"]:
            raise ValueError(
                f"{results['file'].parent} was measured on shard set {results['dataset']['digest'][:12]}, but "
                f"{first['file'].parent} on {first['dataset']['digest'][:12]}; compare on the same one."
            )
        for name in tasks:
            here, there = (_conditions(one["tasks"][name]) for one in (results, first))
            for key in sorted(set(here) | set(there)):
                if key not in WITHOUT_EFFECT and here.get(key) != there.get(key):
                    raise ValueError(
                        f"{results['file'].parent} measured {name} with {key} {here.get(key)}, but "
                        f"{first['file'].parent} with {there.get(key)}; evaluate both with the same options."
                    )


def _conditions(result: dict[str, Any]) -> dict[str, Any]:
    """What must be equal: options, seed, and for density whether the model is masked."""
    return result["options"] | {key: result[key] for key in ("seed", "masked") if key in result}


def _loss(results: dict[str, Any], kind: str) -> float | None:
    if kind == "run":
        return results["model"]["valid_loss"]
    density = results["tasks"].get("density")
    return density["nats_per_color"] if density is not None and density["split"] == "valid" else None


def _point(results: dict[str, Any], task: str, valid_loss: float | None) -> Point:
    model, result = results["model"], results["tasks"][task]
    valid, best = result.get("valid_accuracy"), result.get("best_layer")
    if valid is None and best is not None:
        valid = result["valid_accuracy_by_layer"][best]
    assert valid_loss is not None
    step, seen, parameters = (model[key] for key in ("checkpoint_step", "images_seen", "parameters"))
    return Point(step, seen, parameters, valid_loss, valid, result.get("test_accuracy"), best)


def write_comparison(lines: list[Line], loss: str, command: Command, images: str, excluded: list[str]) -> None:
    """Writes the figure, the page, and last the numbers. Raises ValueError if the task has no such accuracy.

    images: a sentence about the numbers of images. excluded: the results that can't be read, with the reasons.
    """
    key = f"{command.accuracy}_accuracy"
    if any(getattr(point, key) is None for line in lines for point in line.points):
        raise ValueError(f"--task is {command.task}, whose results have no {words(key)}; choose a classification task.")
    command.out.mkdir(parents=True, exist_ok=True)
    draw(lines, command, command.out / FIGURE)
    rows = [
        [
            line.name,
            *(MISSING if count is None else f"{count:,}" for count in (point.step, point.images_seen)),
            f"{point.valid_loss:.4f}",
            MISSING if point.best_layer is None else str(point.best_layer),
            percent(point.valid_accuracy),
            percent(point.test_accuracy),
        ]
        for line in lines
        for point in line.points
    ]
    write_page(
        command.out / PAGE,
        "compare.html",
        title="Image GPT: accuracy against validation loss",
        task=command.task,
        split=SPLITS[command.accuracy],
        plot=command.out / FIGURE,
        rows=rows,
        loss=LOSSES[loss],
        alternative=_alternative(lines, command),
        images=images,
        excluded=excluded,
    )
    models = [{"name": line.name, "points": [asdict(point) for point in line.points]} for line in lines]
    content = {"format": COMPARISON_FORMAT, "version": COMPARISON_VERSION}
    content |= {"task": command.task, "accuracy": command.accuracy, "loss": loss, "models": models}
    write_json(command.out / NUMBERS, content)


def _alternative(lines: list[Line], command: Command) -> str:
    """The alternative text of the figure: both ends of each line."""
    parts = []
    for line in lines:
        ends = [line.points[0], line.points[-1]] if len(line.points) > 1 else line.points
        accuracies = [percent(getattr(point, f"{command.accuracy}_accuracy")) for point in ends]
        losses = [f"{point.valid_loss:.3f}" for point in ends]
        parts.append(f"{line.name}: {' to '.join(accuracies)} at a loss of {' to '.join(losses)}")
    return f"Line chart of {SPLITS[command.accuracy]} accuracy against validation loss. {'; '.join(parts)}."


SPLITS = {"valid": "validation", "test": "test"}


def draw(lines: list[Line], command: Command, path: Path) -> None:
    """Draws accuracy in percent against loss, with step numbers at the ends of each line."""
    figure, axes = new_figure()
    colors = (ACCENT, *BASELINES)
    for number, line in enumerate(lines):
        losses = [point.valid_loss for point in line.points]
        accuracies = [100 * getattr(point, f"{command.accuracy}_accuracy") for point in line.points]
        axes.plot(losses, accuracies, "-o", color=colors[number % len(colors)], markersize=5, label=line.name)
        for end in {0, len(line.points) - 1}:
            if line.points[end].step is not None:
                axes.annotate(
                    f"{line.points[end].step:,}", (losses[end], accuracies[end]), xytext=(5, -11),
                    textcoords="offset points", fontsize=8, color=colors[number % len(colors)],
                )  # fmt: skip
    axes.margins(x=0.08, y=0.12)
    axes.invert_xaxis()
    axes.set(xlabel="validation loss (nats per color)", ylabel=f"{SPLITS[command.accuracy]} accuracy (%)")
    axes.legend(frameon=False)
    save_figure(figure, path)
