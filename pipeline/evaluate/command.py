"""`python -m pipeline evaluate`: parses the options; run.py runs the tasks."""

import shlex
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from data_prep.common.command_line import new_parser, parse, value_of
from data_prep.common.exit_codes import FINISHED
from data_prep.shards.addresses import hide_secrets
from pipeline.evaluate.interrupt import until_stopped
from pipeline.evaluate.options import Sizes
from pipeline.evaluate.registry import TASKS, options_type
from pipeline.evaluate.request import Command, Request
from pipeline.rank_errors import local_rank, reported_once_per_node


def evaluate(arguments: list[str]) -> int:
    """`python -m pipeline evaluate MODEL --shards SHARDS --tasks A,B --out RESULTS`, on one rank or under torchrun.

    Writes RESULTS/<task>.json and figures, and after each task report.html and results.json. Returns 0, or 75 after a
    signal asked it to stop. Raises ValueError for invalid input.
    """
    return until_stopped(partial(_evaluate, arguments))


def _evaluate(arguments: list[str]) -> int:
    with reported_once_per_node(local_rank()):
        request = _parse(arguments)
        out = request.command.out
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out is {out}, which is a file; it must be a folder.")
        from data_prep.shards.reader import open_shard_set  # imported here, so that --help does not import torch

        shards = open_shard_set(request.command.shards)
    from pipeline.evaluate.run import run

    run(request, shards)
    return FINISHED


def _parse(arguments: list[str]) -> Request:
    parser = new_parser("python -m pipeline evaluate", "Runs evaluation tasks on a model and writes a report.")
    parser.add_argument("--config", action="config", help="a YAML file with any of these options")
    parser.add_argument("model", type=Path, help="a run, a checkpoint, a model folder, or hub:ORG/NAME")
    overwrite = "run tasks again that already have results for the same inputs"
    parser.add_argument("--overwrite", "--again", action="store_true", help=overwrite)
    parser.add_class_arguments(Command, skip={"overwrite"})
    parser.add_class_arguments(Sizes)
    file = _config(arguments)
    requested = str(value_of("--tasks", arguments) or file.get("tasks")).replace(" ", "").split(",")
    keys = [*file, *(word[2:].partition("=")[0] for word in arguments if word.startswith("--"))]
    for name, entry in TASKS.items():
        if entry.options is not None or name in requested:
            parser.add_class_arguments(options_type(name), name)
        elif option := next((key for key in keys if key.partition(".")[0] == name), None):
            raise ValueError(f"{option} is an option of the task {name}, which runs only if --tasks names it.")
    values = parse(parser, arguments)
    command = Command(**{name: values[name] for name in Command.__dataclass_fields__})
    sizes = Sizes(**{name: values[name] for name in Sizes.__dataclass_fields__})
    options = {name: values[name] for name in _chosen_tasks(command.tasks)}
    command_line = hide_secrets(shlex.join(["python", "-m", "pipeline", "evaluate", *arguments]))
    return Request(values.model, command, sizes, options, command_line)


def _config(arguments: list[str]) -> dict[str, Any]:
    """The content of the --config file; empty if it can't be read, which the parser reports later."""
    config = value_of("--config", arguments)
    if config is None or not Path(config).is_file():
        return {}
    try:
        content = yaml.safe_load(Path(config).read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        return {}
    return {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}


def _chosen_tasks(tasks: str) -> list[str]:
    """The names in a comma-separated list. Raises ValueError, which lists the known tasks, for an unknown name."""
    names = [name.strip() for name in tasks.split(",")]
    for name in names:
        if name not in TASKS:
            raise ValueError(f"--tasks has {name!r}; the tasks are {', '.join(TASKS)}.")
    return list(dict.fromkeys(names))
