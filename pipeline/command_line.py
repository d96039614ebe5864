"""Parses the options of `train`, and of commands that take the same options."""

from pathlib import Path

import yaml
from jsonargparse import ArgumentParser, Namespace

from data_prep.common.command_line import fill, new_parser, parse, value_of
from data_prep.common.files import read_json
from pipeline.config import TrainConfig


def parse_training(arguments: list[str]) -> tuple[TrainConfig, Path]:
    """The configuration and the run's folder, from the arguments of `train`. Raises ValueError."""
    return parse_start(arguments)[:2]


def parse_start(arguments: list[str]) -> tuple[TrainConfig, Path, int | None]:
    """As `parse_training`, and the step of the checkpoint to resume from, or None."""
    parser = new_parser("python -m pipeline train", "Train a run, or resume it from its newest complete checkpoint.")
    parsed = parse_run(parser, arguments)
    return fill(TrainConfig, parsed), Path(parsed.run), parsed.resume_from


def parse_run(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    """Parses the options of `train` in addition to those that the parser already has.

    Without --config, a run that was started before takes the defaults of its options from its own config.yaml. Raises
    ValueError.
    """
    parser.add_argument("--config", action="config", help="A YAML file with the keys below; see configs/.")
    parser.add_argument("--run", type=str, required=True, help="The folder of the run: new, or of a run to resume.")
    parser.add_argument(
        "--resume_from",
        type=int | None,
        default=None,
        help="Step of an earlier checkpoint to resume from; the later ones are set aside. null: from the newest.",
    )
    parser.add_class_arguments(TrainConfig)
    own = Path(value_of("--run", arguments) or ".") / "config.yaml"
    if value_of("--config", arguments) is None and own.is_file():
        arguments = ["--config", str(own), *arguments]
        if value_of("--data.shards", arguments) is None and value_of("--data", arguments) is None:
            arguments += _recorded_shards(own)
    return parse(parser, arguments)


def _recorded_shards(own: Path) -> list[str]:
    """The shard set as run.json has it, if config.yaml names it relative to another working directory."""
    try:
        shards = yaml.safe_load(own.read_text())["data"]["shards"]
        recorded = read_json(own.with_name("run.json"))["shards"]["path"]
        if "://" not in shards and not Path(shards).exists() and Path(recorded).exists():
            return ["--data.shards", str(recorded)]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        pass  # a damaged file has its own message later
    return []
