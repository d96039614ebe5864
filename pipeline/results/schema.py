"""results.json: all results of one model on one shard set, for other programs.

    format, version    "image-gpt-results", 1
    model           digest, block, objective, parameters, layers, width, heads, resolution, palette_sha256,
                    checkpoint_step, planned_steps (of its schedule), images_seen, source (its training data),
                    shards_digest (of its training set), valid_loss (logged by the run at that step, nats per token);
                    null where unknown
    dataset         name, digest, resolution, colors, classes, images (by split)
    not_run         names of the tasks that the last command to write this file had not run yet
    tasks           by task, the content of its JSON: accuracies as fractions, losses in nats, and their provenance;
                    title, summary and headlines (headline.py) are what a report shows of it
    random_weights  the same for the model with initial weights (`--weights random`), as far as measured
    published       numbers of the paper and related systems: measure, dataset, system, value, source
    commands        the commands of the training and of the evaluation

The file is written atomically after each task.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.common.files import read_json, write_json
from data_prep.shards.reader import ShardSet
from pipeline.checkpoint.metrics_log import read_rows
from pipeline.results.curve import valid_loss_at
from pipeline.results.earlier import with_headlines
from pipeline.results.provenance import ModelFacts, untrained
from pipeline.results.published import PUBLISHED

RESULTS = "results.json"
RANDOM_WEIGHTS = "random_weights"
"""The subfolder of a results folder with the results of initial weights."""
FORMAT, VERSION = "image-gpt-results", 1

Results = dict[str, dict[str, Any]]
"""Task name to the content of its JSON."""


@dataclass(frozen=True)
class Measured:
    """The results in a folder for one model on one shard set."""

    tasks: Results
    random_weights: Results
    others: list[str]
    """Names of files with results of another model or shard set."""


def read_results(folder: Path) -> Results:
    """The content of each task's JSON in a folder, by task; other files are skipped."""
    return {result["task"]: result for _, result in _task_files(folder)}


def read_measured(folder: Path, random_weights: Path, facts: ModelFacts, shards: ShardSet) -> Measured:
    """The results in a folder, and in another folder, which may be absent, the results with initial weights."""
    tasks, others = _read(folder, lambda result: result["model_digest"] == facts.digest, shards)
    untrained_tasks, _ = _read(
        random_weights, lambda result: result["model_digest"] == untrained(facts, result["seed"]).digest, shards
    )
    return Measured(tasks, untrained_tasks, others)


def write_results(
    folder: Path, facts: ModelFacts, shards: ShardSet, measured: Measured, not_run: Sequence[str] = ()
) -> None:
    """Writes results.json into the folder."""
    rows = list(read_rows(facts.metrics)) if facts.metrics else []
    model = {key: value for key, value in asdict(facts).items() if key not in ("metrics", "training_commands")}
    content = {
        "format": FORMAT,
        "version": VERSION,
        "model": model | {"valid_loss": valid_loss_at(rows, facts.checkpoint_step)},
        "dataset": {
            "name": shards.name,
            "digest": shards.digest,
            "resolution": shards.resolution,
            "colors": shards.colors,
            "classes": list(shards.classes),
            "images": {name: split["images"] for name, split in shards.manifest["splits"].items()},
            "images_in_train": shards.images_in_train,
        },
        "not_run": list(not_run),
        "tasks": measured.tasks,
        "random_weights": measured.random_weights,
        "published": [row._asdict() for row in PUBLISHED],
        "commands": commands(facts, measured),
    }
    write_json(folder / RESULTS, content)


def commands(facts: ModelFacts, measured: Measured) -> list[str]:
    """The commands that produced the model and the results, in this order, without duplicates."""
    evaluation = [
        result["command"] for results in (measured.tasks, measured.random_weights) for result in results.values()
    ]
    return list(dict.fromkeys([*facts.training_commands, *evaluation]))


def _read(folder: Path, is_of_model: Callable[[dict[str, Any]], bool], shards: ShardSet) -> tuple[Results, list[str]]:
    """The results of the model on the shard set by task, and the names of files with other results."""
    files = dict(_task_files(folder))
    matching = {
        path: result
        for path, result in files.items()
        if result["dataset_digest"] == shards.digest and is_of_model(result)
    }
    return {result["task"]: result for result in matching.values()}, [
        path.name for path in files if path not in matching
    ]


def _task_files(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The path and content of each task's JSON, with headlines; other JSON files are skipped."""
    for path in sorted(folder.glob("*.json")):
        result = read_json(path)
        if isinstance(result, dict) and "inputs_digest" in result:
            yield path, with_headlines(result)
