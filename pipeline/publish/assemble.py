"""Assembles what is published: a model folder with its results and its card."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from data_prep.common.files import atomic_folder, read_json
from pipeline.model_folder.card import CARD
from pipeline.model_folder.training_record import read_training_record
from pipeline.publish.results_section import RESULTS, card_sections, eval_results
from pipeline.results.curve import CURVE, draw_curve, has_losses
from pipeline.results.schema import read_results
from pipeline.results.task_files import read_task_files
from pipeline.weights.folder_reader import check_finite
from pipeline.weights.model_files import NEEDED, WEIGHTS, WEIGHTS_INDEX, may_replace, model_digest

RESULT_FILES = (".json", ".png", ".html")
CREDENTIALS = re.compile(r"(?<=://)[^/\s\"'@]+@")
"""A user name and a password in a URL."""
NAME = r"""(?!\*)[^\s/"'<>,:;&`)\]|]+"""
"""Of a file or folder; a star would begin a comment in a style sheet."""
PATH = re.compile(
    rf"""
    (?<=")(?:/(?:(?!\ -)[^/"\n])+)*/((?:(?!\ -)[^/"\n])+)/*(?=")   # all of a quoted string, which may have spaces
    | (?<=')(?:/(?:(?!\ -)[^/'\n])+)*/((?:(?!\ -)[^/'\n])+)/*(?=')
    | (?:^|(?<=[\s"'=:;>(\[`])|(?<=[^4],))(?:file://)?             # or a word, but not in "base64,/9j/"
      (?:/{NAME})*/({NAME})/*(?!\*)
    """,
    re.VERBOSE | re.MULTILINE,
)
"""An absolute path; its last name is a group."""
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
"""The format of the hub's tokens."""


WriteCard = Callable[..., None]
"""`write_card` with everything bound but the folder, `measured`, `sections` and `layer`."""


def publish_to_folder(model: Path, results: Path | None, target: Path, card: WriteCard) -> None:
    """Writes `target` atomically, with the same files as a repository; replaces an earlier publication there.

    Raises ValueError if `target` contains something else or a later step.
    """
    target = target.resolve()
    if target == model.resolve():
        raise ValueError(f"--to is dir:{target}, which is the model folder itself; give another folder.")
    _check_replaceable(model, target)
    with atomic_folder(target) as temporary:
        assemble(model, results, temporary, card)


def assemble(model: Path, results: Path | None, folder: Path, card: WriteCard, *, link_weights: bool = False) -> None:
    """Fills an empty folder with the model, its results (those in the model folder if None), and the card.

    link_weights: make symbolic links to the weights instead of copies.

    Raises ValueError if the model is incomplete, the results are of another model, or a file contains a token.
    """
    check_complete(model)
    for file in _files_of(model):
        if results is None or RESULTS not in file.parents:
            _copy(model / file, folder / file, link=link_weights and file.suffix == ".safetensors")
    if results is not None:
        check_results(results, model)
        for file in _files_of(results):
            if file.suffix in RESULT_FILES:
                _copy(results / file, folder / RESULTS / file)
    _hide_private(folder)
    _draw_missing_curve(folder)
    results_read = read_results(folder / RESULTS)
    layer = results_read.get("linear_probe", {}).get("best_layer")
    card(folder, measured=eval_results(results_read), sections=card_sections(folder), layer=layer)


def step_of(folder: Path) -> int | None:
    """The training step of a model folder; None if it does not record one."""
    return read_training_record(folder).step


def check_complete(model: Path) -> None:
    """Raises ValueError that names the first missing or damaged file of a model folder, or a weight with NaN or Inf."""
    for name in NEEDED:
        if not (model / name).is_file():
            raise ValueError(f"{model} has no {name}; publish a run, a checkpoint, or a folder that `export` wrote.")
    for name in weight_files(model):
        try:
            with safe_open(str(model / name), framework="pt") as weights:
                for weight in weights.keys():  # noqa: SIM118 (not a mapping)
                    check_finite(weight, weights.get_tensor(weight), model)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{model / name} can't be read ({error}); export the model again.") from error


def weight_files(model: Path) -> list[str]:
    """The names of the weights' files. Raises ValueError if there are none in safetensors."""
    if (model / WEIGHTS_INDEX).is_file():
        return sorted(set(read_json(model / WEIGHTS_INDEX)["weight_map"].values()))
    if not (model / WEIGHTS).is_file():
        raise ValueError(f"{model} has no {WEIGHTS}; only weights in safetensors can be published.")
    return [WEIGHTS]


def check_results(results: Path, model: Path) -> None:
    """Raises ValueError if the folder has no results, or results of another model."""
    if not results.is_dir():
        raise ValueError(f"--results is {results}, which is not a folder; give a folder that `evaluate` wrote.")
    files, unreadable = read_task_files(results)
    if not files:
        reasons = "".join(f"; {name} {reason}" for name, reason in unreadable.items())
        raise ValueError(f"--results is {results}, which has no results; give a folder that `evaluate` wrote{reasons}.")
    digest = model_digest(model)
    for result in files.values():
        if result["model_digest"] != digest:
            raise ValueError(
                f"{results} has {result['task']} of the model {result['model_digest'][:12]}, but {model} is "
                f"{digest[:12]}; evaluate this model, or give its results."
            )


def _check_replaceable(model: Path, target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise ValueError(f"--to is dir:{target}, which is a file; give a folder.")
    if not may_replace(target, (*NEEDED, CARD)):
        raise ValueError(f"--to is dir:{target}, which has other files; give a new folder, or a published one.")
    published, step = step_of(target), step_of(model)
    if published is not None and step is not None and step < published:
        raise ValueError(f"--to is dir:{target}, which has step {published}; give another folder for step {step}.")


def _files_of(folder: Path) -> list[Path]:
    """Relative paths of the files in a folder, without hidden files."""
    files = [file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file()]
    return [file for file in files if not any(part.startswith(".") for part in file.parts)]


def _copy(source: Path, target: Path, *, link: bool = False) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        target.symlink_to(source.resolve())
    else:
        shutil.copyfile(source, target)


def _draw_missing_curve(folder: Path) -> None:
    """Draws the training curve, unless a report already did, if the folder has the run's metrics.

    Its baselines are from the results of density, if there are any.
    """
    table, path = read_training_record(folder).table, folder / RESULTS / CURVE
    if not path.exists() and has_losses(table):
        colors = read_json(folder / "config.json")["vocab_size"] - 1
        draw_curve(table, colors, read_results(folder / RESULTS).get("density"), path)


def _hide_private(folder: Path) -> None:
    """Removes user names and passwords from URLs, and all of an absolute path but its last name.

    Raises ValueError that names a file with a token.
    """
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".json", ".jsonl", ".yaml", ".html", ".md"):
            continue
        text = path.read_text(errors="surrogateescape")
        if TOKEN.search(text):
            raise ValueError(f"{path.relative_to(folder)} contains a token (hf_...); remove it before publishing.")
        if "/" not in text:  # as in millions of rows of metrics
            continue
        hidden = PATH.sub(lambda found: found[found.lastindex or 0], CREDENTIALS.sub("", text))
        if hidden != text:
            path.write_text(hidden, errors="surrogateescape")
