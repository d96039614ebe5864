"""results.json: all results of one model on one shard set, for other programs.

    format, version    "image-gpt-results", 2 (of a task: task_files.py); 1 had no keys that are marked (2)
    model           digest, block, objective, parameters, layers, width, heads, resolution, palette_sha256,
                    checkpoint_step, planned_steps (of its schedule), images_seen, source (its training data),
                    shards_digest (of its training set; null for a mixture), mixture (its training sets: name, digest,
                    weight; absent if there is one set) (2), started_from (the model whose weights its training started
                    from) (2), averaged_steps (whose weights were averaged; [] if none) (2), weights (raw, or ema: the
                    run's moving average) (2), valid_loss (of these weights, logged by the run at that step, nats per
                    token; null for the average of steps); null where unknown
    dataset         name, digest, resolution, colors, classes, images (by split), images_in_train (images of valid and
                    test whose tokens a training image has too; a split is absent if not counted) (2)
    not_run         names of the tasks that the last command to write this file had not run yet
    tasks           by task, the content of its JSON: accuracies as fractions, losses in nats, and their provenance;
                    title, summary and headlines (headline.py) are what a report shows of it. class_names has only
                    classes that occur, confusion may be an object of its cells, and test_standard_error and intervals
                    are null for a single image (2)
    random_weights  the same for the model with initial weights (`--weights random`), as far as measured
    published       numbers of the paper and related systems: measure, dataset, system, value, source
    commands        the commands of the training and of the evaluation

The file is written atomically after each task.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.common.files import read_json, write_json
from data_prep.shards.reader import ShardSet
from pipeline.checkpoint.metrics_table import read_table, table_of
from pipeline.results.curve import valid_loss_at
from pipeline.results.headline import Results
from pipeline.results.provenance import ModelFacts, untrained
from pipeline.results.published import PUBLISHED
from pipeline.results.task_files import read_task_files

RESULTS = "results.json"
RANDOM_WEIGHTS = "random_weights"
"""The subfolder of a results folder with the results of initial weights."""
FORMAT, VERSION = "image-gpt-results", 2


@dataclass(frozen=True)
class Measured:
    """The results in a folder for one model on one shard set."""

    tasks: Results
    random_weights: Results
    others: list[str]
    """Names of files with results of another model or shard set."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Names of files that can't be read, such as a later version's, with the reasons."""


def read_results(folder: Path) -> Results:
    """The content of each task's JSON in a folder, by task; files that can't be read and other files are skipped."""
    return {result["task"]: result for result in read_task_files(folder)[0].values()}


def read_measured(folder: Path, random_weights: Path, facts: ModelFacts, shards: ShardSet) -> Measured:
    """The results in a folder, and in another folder, which may be absent, the results with initial weights."""
    tasks, others, unreadable = _read(folder, lambda result: result["model_digest"] == facts.digest, shards)

    def is_untrained(result: dict[str, Any]) -> bool:
        return result["model_digest"] == untrained(facts, result.get("seed", 0)).digest

    untrained_tasks, _, also = _read(random_weights, is_untrained, shards)
    return Measured(tasks, untrained_tasks, others, unreadable | {f"{random_weights.name}/{k}": also[k] for k in also})


def write_results(
    folder: Path, facts: ModelFacts, shards: ShardSet, measured: Measured, not_run: Sequence[str] = ()
) -> None:
    """Writes results.json into the folder."""
    table = read_table(facts.metrics) if facts.metrics else table_of([])
    model = {key: value for key, value in asdict(facts).items() if key not in ("metrics", "training_commands")}
    valid_loss = None if facts.averaged_steps else valid_loss_at(table, facts.checkpoint_step, facts.weights)
    if not facts.mixture:
        del model["mixture"]
    content = {
        "format": FORMAT,
        "version": VERSION,
        "model": model | {"valid_loss": valid_loss},
        "dataset": dataset_of(shards),
        "not_run": list(not_run),
        "tasks": measured.tasks,
        "random_weights": measured.random_weights,
        "published": [row._asdict() for row in PUBLISHED],
        "commands": commands(facts, measured),
    }
    write_json(folder / RESULTS, content)


def dataset_of(shards: ShardSet) -> dict[str, Any]:
    """`dataset` of results.json."""
    return {
        "name": shards.name,
        "digest": shards.digest,
        "resolution": shards.resolution,
        "colors": shards.colors,
        "classes": list(shards.classes),
        "images": {name: split["images"] for name, split in shards.manifest["splits"].items()},
        "images_in_train": shards.images_in_train,
    }


def read_dataset(folder: Path, digests: Collection[str]) -> dict[str, Any]:
    """`dataset` of the results.json in a folder; empty if there is none of one of these shard sets."""
    try:
        dataset = read_json(folder / RESULTS)["dataset"]
        known = dataset["digest"] in digests and all(
            isinstance(dataset[k], dict) for k in ("images", "images_in_train")
        )
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return dataset if known else {}


def commands(facts: ModelFacts, measured: Measured) -> list[str]:
    """The commands that produced the model and the results, in this order, without duplicates."""
    evaluation = [
        result["command"] for results in (measured.tasks, measured.random_weights) for result in results.values()
    ]
    return list(dict.fromkeys([*facts.training_commands, *evaluation]))


def _read(
    folder: Path, is_of_model: Callable[[dict[str, Any]], bool], shards: ShardSet
) -> tuple[Results, list[str], dict[str, str]]:
    """The results of the model on the shard set by task, the names of files with other results, and the names of
    files that can't be read with the reasons."""
    files, unreadable = read_task_files(folder)
    matching = {
        path: result
        for path, result in files.items()
        if result["dataset_digest"] == shards.digest and is_of_model(result)
    }
    others = [path.name for path in files if path not in matching]
    return {result["task"]: result for result in matching.values()}, others, unreadable
