"""Runs evaluation tasks on one model, one after the other, and writes each result and the report."""

import json
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

from data_prep.common.files import json_digest, locked, read_json, to_json, write_json
from data_prep.shards.reader import ShardSet
from pipeline.distributed import from_first
from pipeline.evaluate.cache import TaskCache, clear_unfinished, lock_of
from pipeline.evaluate.context import Evaluation, load_matching, start_accelerator
from pipeline.evaluate.registry import TASKS, task_class
from pipeline.evaluate.request import Request
from pipeline.evaluate.task import Task
from pipeline.memory_errors import with_batch_size_advice
from pipeline.model.gpt import initialize
from pipeline.model_folder.resolve import model_folder
from pipeline.model_folder.training_record import averaged_text
from pipeline.results.provenance import ModelFacts, model_facts, untrained
from pipeline.results.report.page import REPORT, write_report
from pipeline.results.task_files import FORMAT, VERSION, is_later, version_of

logger = logging.getLogger(__name__)

FEATURES = ".features"


def run(request: Request, shards: ShardSet) -> None:
    """Runs the tasks that have no results for the same inputs yet.

    Raises ValueError for invalid input, and after the last task OSError if the report could not be written.
    """
    evaluation, facts = _start(request, shards)
    evaluation.log(_describe(facts, evaluation))
    jobs = _fitting_jobs(request, evaluation, facts)
    if not jobs:
        evaluation.log("no task to run")
        evaluation.accelerator.end_training()
        return
    missing = from_first(lambda: [job.name for job in jobs if not job.is_measured()])
    from_first(lambda: _check(jobs, missing))
    failed: str | None = None
    for number, job in enumerate(jobs):
        ran = job.run()
        following = jobs[number + 1 :]
        if ran or not following:  # after each task, so that a stopped command leaves a report of the finished ones
            not_run = {other.name: other.task.title for other in following if other.name in missing}
            failed = from_first(partial(_report, evaluation, facts, request.command.random_weights, not_run))
    evaluation.accelerator.end_training()
    page = request.command.out / REPORT
    if failed is not None:
        raise OSError(f"{page} could not be written ({failed}); all results are in their JSON.")
    evaluation.log(f"report: {page}")


def _start(request: Request, shards: ShardSet) -> tuple[Evaluation, ModelFacts]:
    """Loads the model. Raises ValueError if there is none, or if it does not match the shard set."""
    command = request.command
    accelerator = start_accelerator(command.precision)
    folder = from_first(lambda: model_folder(request.model))
    model = load_matching(folder, shards)
    facts = from_first(lambda: model_facts(folder, model))
    if command.weights == "random":
        initialize(model.model, command.seed)
        facts = untrained(facts, command.seed)
    from_first(lambda: command.out.mkdir(parents=True, exist_ok=True))
    model.model.to(accelerator.device).eval()
    evaluation = Evaluation(
        model=model,
        shards=shards,
        results=command.out,
        accelerator=accelerator,
        seed=command.seed,
        sizes=request.sizes,
        cache=TaskCache.of_task(command.out, "none", facts.digest),
        features=command.features or command.out / FEATURES,
        model_digest=facts.digest,
        weights=command.weights,
    )
    return evaluation, facts


def _describe(facts: ModelFacts, evaluation: Evaluation) -> str:
    planned = "" if facts.planned_steps is None else f" of {facts.planned_steps:,}"
    step = "" if facts.checkpoint_step is None else f" at step {facts.checkpoint_step:,}{planned}"
    averaged = f" (weights: {text})" if (text := averaged_text(facts.averaged_steps, facts.weights)) else ""
    ranks = evaluation.accelerator.num_processes
    return (
        f"model {facts.digest[:12]}{step}{averaged}: {facts.parameters:,} parameters, "
        f"{facts.layers} layers of width {facts.width}; "
        f"shard set {evaluation.shards.digest[:12]} ({evaluation.shards.name}); "
        f"{ranks} {'rank' if ranks == 1 else 'ranks'} on {evaluation.accelerator.device.type}"
    )


@dataclass(frozen=True)
class Job:
    """One task of the command."""

    name: str
    task: Task[Any]
    evaluation: Evaluation
    facts: ModelFacts
    request: Request

    @property
    def path(self) -> Path:
        """The task's JSON."""
        return self.evaluation.results / f"{self.name}.json"

    def inputs(self) -> dict[str, Any]:
        """What the task's JSON records of its current inputs: `options`, digests of files, and `inputs_digest`.

        `inputs_digest` covers these, the model, the shard set and the seed. Raises ValueError if something that the
        task reads is missing.
        """
        precision, evaluation = self.request.command.precision, self.evaluation
        settings = {"precision": precision} | asdict(evaluation.sizes) | asdict(self.task.options)
        others = self.task.other_inputs(evaluation.results)
        digest = json_digest([self.facts.digest, evaluation.shards.digest, evaluation.seed, settings | others])
        return {"options": settings, **others, "inputs_digest": digest}

    def is_measured(self) -> bool:
        """Whether the result for these inputs exists and --overwrite is not set."""
        try:
            return self._is_measured_with(self.inputs())
        except ValueError:  # an earlier task may still write what it reads; otherwise `check` reports it
            return False

    def run(self) -> bool:
        """Runs the task and writes its JSON last; skips it if it is measured. Returns whether it ran.

        Waits for another command that runs the same task with the same --out.
        """
        with ExitStack() as stack:
            lock = lock_of(self.evaluation.results, self.name)
            from_first(lambda: stack.enter_context(locked(lock, str(self.path))))
            return self._run_alone()

    def _run_alone(self) -> bool:
        inputs, start = from_first(self.inputs), time.monotonic()
        if from_first(lambda: self._is_measured_with(inputs)):
            self.evaluation.log(
                f"{self.name}: already measured with these inputs, skipped ({self._how_to_overwrite()})"
            )
            return False
        if self.path.is_file() and not _read(self.path):
            self.evaluation.log(f"{self.name}: {self.path} is damaged; the task runs again")
        if self._is_of_other_inputs():
            logger.warning(f"{self.path} has results of another model or shard set, which these will replace")
        cache = TaskCache.of_task(self.evaluation.results, self.name, inputs["inputs_digest"])
        with with_batch_size_advice(self.name, self.evaluation.sizes.batch_size):
            result = self.task.measure(replace(self.evaluation, cache=cache))
        seconds = round(time.monotonic() - start, 1)
        content = self._content(self._provenance(inputs, seconds), result)
        from_first(lambda: write_json(self.path, content))
        from_first(lambda: clear_unfinished(self.evaluation.results, self.name))
        self.evaluation.log(f"{self.name}: {content['summary']} ({seconds:.0f} s)")
        return True

    def _provenance(self, inputs: dict[str, Any], seconds: float) -> dict[str, Any]:
        shards = self.evaluation.shards
        return {
            "format": FORMAT,
            "version": VERSION,
            "task": self.name,
            "checkpoint_step": self.facts.checkpoint_step,
            "model_digest": self.facts.digest,
            "weights": self.evaluation.weights,
            "dataset": shards.name,
            "dataset_digest": shards.digest,
            "palette_sha256": shards.palette_sha256,
            "seed": self.evaluation.seed,
            "command": self.request.command_line,
            **inputs,
            "seconds": seconds,
        }

    def _content(self, provenance: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
        """The task's JSON: numpy's numbers as Python's, and NaN and Inf as null, which other programs can read.

        Raises ValueError if the result has a key that is reserved for the provenance or the display.
        """
        result = json.loads(json.dumps(result, default=methodcaller("tolist")))
        shown = _shown(self.task, result)
        if taken := next((key for key in result if key in provenance | shown), None):
            raise ValueError(f"{self.name} has {taken!r} in its result, a key that evaluate writes; rename it.")
        return json.loads(to_json(provenance | result | shown))

    def _is_measured_with(self, inputs: dict[str, Any]) -> bool:
        measured = _read(self.path).get("inputs_digest")
        return not self.request.command.overwrite and measured == inputs["inputs_digest"]

    def _is_of_other_inputs(self) -> bool:
        """Whether there are results of another model or shard set; False on all ranks but the first."""
        found, ours = _read(self.path), (self.facts.digest, self.evaluation.shards.digest)
        return (
            bool(found)
            and self.evaluation.is_first
            and (found.get("model_digest"), found.get("dataset_digest")) != ours
        )

    def _how_to_overwrite(self) -> str:
        """What --overwrite would do, with a note if the classifier's folder was deleted since."""
        folder = self.path.parent / _read(self.path).get("classifier", "")
        if folder.is_dir():
            return "--overwrite runs it again"
        return f"but its folder {folder} no longer exists: --overwrite trains the classifier again"


def _read(path: Path) -> dict[str, Any]:
    """The JSON of a task; empty if there is none, or if it is damaged."""
    try:
        result = read_json(path) if path.is_file() else None
    except ValueError:
        return {}
    return result if isinstance(result, dict) else {}


def _fitting_jobs(request: Request, evaluation: Evaluation, facts: ModelFacts) -> list[Job]:
    """The tasks that can run on this model. Raises ValueError for a task that --tasks names and that can't."""
    jobs = {
        name: Job(name, task_class(name)(options), evaluation, facts, request)
        for name, options in request.options.items()
    }

    def fitting() -> list[str]:
        reasons = {name: job.task.unfit(evaluation) for name, job in jobs.items()}
        for name, reason in reasons.items():
            if reason is not None and request.command.named:
                raise ValueError(f"--tasks has {name}: {reason}")
            if reason is not None:
                evaluation.log(f"{name}: skipped; {reason}")
        return [name for name, reason in reasons.items() if reason is None]

    return [jobs[name] for name in from_first(fitting)]


def _check(jobs: list[Job], missing: list[str]) -> None:
    """Raises the ValueError of the first task whose options do not fit, or that would replace a later version's."""
    for number, job in enumerate(jobs):
        if is_later(_read(job.path)) and not job.request.command.overwrite:
            raise ValueError(
                f"{job.path} was written by a later version of this program (version {version_of(_read(job.path))} of "
                f"its format, this one has {VERSION}); give another --out, or --overwrite."
            )
        job.task.check(job.evaluation, [earlier.name for earlier in jobs[:number] if earlier.name in missing])


def _shown(task: Task[Any], result: dict[str, Any]) -> dict[str, Any]:
    """What the report, the card and the comparison show of a task; they read it from its JSON."""
    headlines = [asdict(headline) for headline in task.headlines(result)]
    return {"title": task.title, "summary": task.summary(result), "headlines": headlines}


def _report(
    evaluation: Evaluation, facts: ModelFacts, random_weights: Path | None, not_run: Mapping[str, str]
) -> str | None:
    """Writes the report; returns what went wrong, if anything: the tasks that follow must still be measured."""
    sections = {name: _section(name) for name in TASKS}
    try:
        write_report(evaluation.results, facts, evaluation.shards, random_weights, not_run, sections=sections)
    except Exception as error:
        logger.exception(f"{evaluation.results / REPORT} could not be written")
        return " ".join(str(error).split()) or type(error).__name__
    return None


def _section(name: str) -> Callable[[dict[str, Any], Path], str]:
    """The function that renders a task's section; it imports the task's module only when there is a result to show."""

    def section(result: dict[str, Any], folder: Path) -> str:
        task = task_class(name)
        return task.section(result if "summary" in result else result | {"summary": task.summary(result)}, folder)

    return section
