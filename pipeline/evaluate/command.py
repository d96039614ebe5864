"""`python -m pipeline evaluate`: the tasks there are, and the command that runs some of them on one model.

A task is one file with a dataclass `Options`, functions `measure(evaluation, options) -> dict` and
`summary(result) -> str`, and one line in TASKS. `measure` runs on every rank, writes its figures into
`evaluation.results` from the first rank alone, and returns numbers that JSON can hold. Raises ValueError for a user's
mistake. Before the first task begins, and on the first rank alone, every task is asked what it has of

    unfit(evaluation, options) -> str | None    why in a sentence the model or the shard set can't be measured so; a
                                                task that was not named is left out then
    check(evaluation, options, coming)          raises ValueError if an option does not fit them, or something is
                                                missing that no task of `coming`, before it, will bring; it is quick

sections.py tells how a task may word its part of the report. A task that reads more than the model and the shard set
has `read_besides(results, options) -> dict` too: what it gives, such as digests, is written down, and a task is done
again when it changed.
"""

import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace

from data_prep.common.command_line import new_parser, parse
from data_prep.common.exit_codes import FINISHED
from data_prep.common.files import read_json, write_json
from data_prep.shards.reader import open_shard_set
from pipeline.evaluate.cache import Kept
from pipeline.evaluate.context import Evaluation, Sizes, Weights, check_match, from_first, start_accelerator
from pipeline.evaluate.interrupt import until_stopped
from pipeline.evaluate.registry import LONG, MEASURES, TASKS, TITLES, _module
from pipeline.rank_errors import local_rank, reported_once_per_node
from pipeline.results.headline import accuracy_headlines
from pipeline.results.provenance import ModelFacts, inputs_digest, model_facts, options_of, untrained
from pipeline.results.text import words

FEATURES = ".features"


@dataclass(frozen=True, kw_only=True)
class Command:
    """What to measure and where the results go."""

    shards: str
    """The shard set to measure on: a folder or an address."""
    out: Path
    """The folder of results."""
    tasks: str = ",".join(name for name in TASKS if name not in LONG)
    """Names of tasks, with commas between, in the order in which they run; beside the default's there are
    attentive_probe, fine_tune and distill, which train for many epochs."""
    seed: int = 0
    """Chooses pictures where there is a cap, and draws completions."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward passes."""
    weights: Weights = "trained"
    """random: initial weights in place of the model's, as a baseline; give it a folder of results of its own."""
    random_weights: Path | None = None
    """The results of a call with `--weights random`, for the report; OUT/random_weights if not set."""
    features: Path | None = None
    """Where features of pictures are cached, for all tasks and later calls; OUT/.features if not set."""
    again: bool = False
    """Measure again what was already measured with the same inputs."""


def evaluate(arguments: list[str]) -> int:
    """`python -m pipeline evaluate MODEL --shards SHARDS --tasks A,B --out RESULTS`, on one rank or under torchrun.

    Leaves RESULTS/<task>.json and figures, and after each task report.html and results.json. Returns 0, or 75 if it was
    asked to stop. Raises ValueError for a user's mistake.
    """
    return until_stopped(partial(_evaluate, arguments))


def _evaluate(arguments: list[str]) -> int:
    with reported_once_per_node(local_rank()):
        path, command, sizes, options = _parse(arguments)
        names = _chosen_tasks(command.tasks)
        shards = open_shard_set(command.shards)
        if command.out.exists() and not command.out.is_dir():
            raise ValueError(f"--out is {command.out}, which is a file; it must be a folder.")

    from pipeline.model.gpt import initialize
    from pipeline.model_folder.convert import load_model_folder
    from pipeline.model_folder.resolve import model_folder

    accelerator = start_accelerator(command.precision)
    folder = from_first(accelerator, lambda: model_folder(path))
    model = load_model_folder(folder)
    check_match(model, folder, shards)
    facts = from_first(accelerator, lambda: model_facts(folder, model))
    if command.weights == "random":
        initialize(model.model, command.seed)
        facts = untrained(facts, command.seed)
    from_first(accelerator, lambda: command.out.mkdir(parents=True, exist_ok=True))
    model.model.to(accelerator.device).eval()
    evaluation = Evaluation(
        model,
        shards,
        command.out,
        accelerator,
        command.seed,
        sizes,
        Kept(command.out, "none", facts.digest),
        command.features or command.out / FEATURES,
        facts.digest,
        command.weights,
    )
    evaluation.say(_describe(facts, evaluation))

    command_line = shlex.join(["python", "-m", "pipeline", "evaluate", *arguments])
    asked = command.tasks != Command.tasks
    names = from_first(accelerator, lambda: _fit_tasks(names, evaluation, options, asked=asked))
    inputs = {name: partial(_inputs, name, evaluation, facts, options[name], command) for name in names}
    left = from_first(accelerator, lambda: _to_be_measured(inputs, command))
    from_first(accelerator, lambda: _check(names, left, evaluation, options))
    page = None
    for place, name in enumerate(names):
        measured = _run_task(name, evaluation, facts, options[name], inputs[name], command, command_line)
        following = names[place + 1 :]
        if measured or not following:  # after each, so that one that is stopped leaves a report of those that ended
            not_run = [other for other in following if other in left]
            page = from_first(accelerator, partial(_report, evaluation, facts, command.random_weights, not_run))
    evaluation.say(f"report: {page}")
    accelerator.end_training()
    return FINISHED


def _parse(arguments: list[str]) -> tuple[Path, Command, Sizes, Namespace]:
    parser = new_parser("python -m pipeline evaluate", "Measures a model: probes, density, completions, and a report.")
    parser.add_argument("--config", action="config", help="a YAML file with any of these options")
    parser.add_argument("model", type=Path, help="a run, a checkpoint, a model folder, or hub:ORG/NAME")
    parser.add_argument("--again", action="store_true", help="measure again what was measured with the same inputs")
    parser.add_class_arguments(Command, skip={"again"})
    parser.add_class_arguments(Sizes)
    for name in TASKS:
        parser.add_class_arguments(_module(name).Options, name)
    values = parse(parser, arguments)
    command = Command(**{name: values[name] for name in Command.__dataclass_fields__})
    sizes = Sizes(**{name: values[name] for name in Sizes.__dataclass_fields__})
    return values.model, command, sizes, values


def _chosen_tasks(tasks: str) -> list[str]:
    """The names in a list with commas. Raises ValueError naming the tasks there are."""
    names = [name.strip() for name in tasks.split(",")]
    for name in names:
        if name not in TASKS:
            raise ValueError(f"--tasks has {name!r}; the tasks are {', '.join(TASKS)}.")
    return list(dict.fromkeys(names))


def _fit_tasks(names: list[str], evaluation: Evaluation, options: Namespace, *, asked: bool) -> list[str]:
    """The tasks that this model can be measured by; one that was asked for by name and can't raises ValueError."""
    fit = []
    for name in names:
        unfit = getattr(_module(name), "unfit", lambda *_: None)(evaluation, options[name])
        if unfit is None:
            fit.append(name)
        elif asked:
            raise ValueError(f"--tasks has {name}: {unfit}")
        else:
            evaluation.say(f"{name}: left out; {unfit}")
    return fit


@dataclass(frozen=True)
class Inputs:
    """All that a task's result depends on, beside the model, the shard set and the seed."""

    settings: dict[str, Any]
    besides: dict[str, str]
    digest: str
    """Of these, and of the model, the shard set and the seed."""


def _inputs(name: str, evaluation: Evaluation, facts: ModelFacts, options: Any, command: Command) -> Inputs:
    """A task's inputs as they are by now. Raises ValueError if something that it reads is missing."""
    task = _module(name)
    settings = {"precision": command.precision} | options_of(evaluation.sizes, options)
    besides = task.read_besides(evaluation.results, options) if hasattr(task, "read_besides") else {}
    digest = inputs_digest(facts, evaluation.shards.digest, evaluation.seed, settings | besides)
    return Inputs(settings, besides, digest)


def _to_be_measured(inputs: Mapping[str, Callable[[], Inputs]], command: Command) -> list[str]:
    """The tasks that were not measured with these inputs, or are to be again."""
    left = []
    for name, current in inputs.items():
        try:
            measured = current().digest == _measured_inputs(command.out / f"{name}.json")
        except ValueError:  # what it reads may be to come, else `check` says so
            measured = False
        if command.again or not measured:
            left.append(name)
    return left


def _check(names: list[str], left: list[str], evaluation: Evaluation, options: Namespace) -> None:
    """Raises the ValueError of the first task that can't be measured with its options."""
    for place, name in enumerate(names):
        check = getattr(_module(name), "check", None)
        if check is not None:
            check(evaluation, options[name], [other for other in names[:place] if other in left])


def _run_task(
    name: str,
    evaluation: Evaluation,
    facts: ModelFacts,
    options: Any,
    current: Callable[[], Inputs],
    command: Command,
    command_line: str,
) -> bool:
    """Runs one task and writes its JSON, last, unless the same was measured before; returns whether it ran."""
    path = evaluation.results / f"{name}.json"
    inputs = from_first(evaluation.accelerator, current)
    if not command.again and from_first(evaluation.accelerator, lambda: _measured_inputs(path)) == inputs.digest:
        evaluation.say(f"{name}: already measured with these inputs, kept ({_anew(path)})")
        return False
    start = time.monotonic()
    kept = Kept(evaluation.results, name, inputs.digest)
    result = _module(name).measure(replace(evaluation, kept=kept), options)
    provenance = {
        "task": name,
        "checkpoint_step": facts.checkpoint_step,
        "model_digest": facts.digest,
        "weights": evaluation.weights,
        "dataset": evaluation.shards.name,
        "dataset_digest": evaluation.shards.digest,
        "palette_sha256": evaluation.shards.palette_sha256,
        "seed": evaluation.seed,
        "command": command_line,
        "options": inputs.settings,
        **inputs.besides,
        "inputs_digest": inputs.digest,
        "seconds": round(time.monotonic() - start, 1),
    }
    from_first(evaluation.accelerator, lambda: write_json(path, provenance | _shown(name, result) | result))
    from_first(evaluation.accelerator, kept.clear)
    evaluation.say(f"{name}: {_module(name).summary(result)} ({provenance['seconds']:.0f} s)")
    return True


def _shown(name: str, result: dict[str, Any]) -> dict[str, Any]:
    """What report, card and comparison show of a task: they read it from its JSON."""
    task, title = _module(name), _title(name)
    own = getattr(task, "headlines", None)
    headlines = own(result) if own is not None else accuracy_headlines(result, title, MEASURES.get(name, ""))
    return {
        "title": title,
        "summary": task.summary(result),
        "headlines": [headline.to_json() for headline in headlines],
    }


def _title(name: str) -> str:
    return TITLES.get(name, words(name).capitalize())


def _measured_inputs(path: Path) -> str | None:
    result = read_json(path) if path.is_file() else None
    return result.get("inputs_digest") if isinstance(result, dict) else None


def _anew(path: Path) -> str:
    """What --again is for, with a word on the classifier's folder if that was deleted since."""
    folder = path.parent / (read_json(path) if path.is_file() else {}).get("classifier", "")
    if folder.is_dir():
        return "--again measures anew"
    return f"but its folder {folder} is gone: --again trains the classifier anew"


def _report(evaluation: Evaluation, facts: ModelFacts, random_weights: Path | None, not_run: list[str]) -> Path:
    from pipeline.results.report.page import write_report
    from pipeline.results.report.sections import generic_section

    titles = {name: _title(name) for name in not_run}
    sections = {name: getattr(_module(name), "section", generic_section) for name in TASKS}
    return write_report(evaluation.results, facts, evaluation.shards, random_weights, titles, sections=sections)


def _describe(facts: ModelFacts, evaluation: Evaluation) -> str:
    planned = "" if facts.planned_steps is None else f" of {facts.planned_steps:,}"
    step = "" if facts.checkpoint_step is None else f" at step {facts.checkpoint_step:,}{planned}"
    ranks = evaluation.accelerator.num_processes
    return (
        f"model {facts.digest[:12]}{step}: {facts.parameters:,} parameters, "
        f"{facts.layers} layers of width {facts.width}; "
        f"shard set {evaluation.shards.digest[:12]} ({evaluation.shards.name}); "
        f"{ranks} {'rank' if ranks == 1 else 'ranks'} on {evaluation.accelerator.device.type}"
    )
