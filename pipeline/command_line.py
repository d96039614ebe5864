"""Parses the options of `train`, and of commands that take the same options."""

import json
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
        if not any(value_of(key, arguments) for key in ("--data.shards", "--data.mixture", "--data")):
            arguments += _recorded_shards(own)
        if not any(value_of(key, arguments) for key in ("--probe.shards", "--probe")):
            arguments += _recorded_probe_shards(own)
    return parse(parser, with_one_kind_of_data(arguments))


def with_one_kind_of_data(arguments: list[str]) -> list[str]:
    """The arguments, in which data.shards or data.mixture replaces the other one of the --config file."""
    given = {key for key in ("--data.shards", "--data.mixture") if value_of(key, arguments) is not None}
    others = {"--data.shards", "--data.mixture"} - given if len(given) == 1 else ()
    return [*arguments, *(f"{other}=null" for other in others)]


def _recorded_shards(own: Path) -> list[str]:
    """The shard sets as run.json has them, if config.yaml names them relative to another working directory."""
    try:
        data, recorded = yaml.safe_load(own.read_text())["data"], read_json(own.with_name("run.json"))["shards"]
        if data.get("mixture"):
            wanted, known = data["mixture"], recorded["mixture"]
            if len(wanted) == len(known):
                pairs = zip(wanted, known, strict=True)
                moved = [entry | {"shards": _where(entry["shards"], one["path"])} for entry, one in pairs]
                return ["--data.mixture", json.dumps(moved)] if moved != wanted else []
        elif (path := _where(data["shards"], recorded["path"])) != data["shards"]:
            return ["--data.shards", path]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        pass  # a damaged file has its own message later
    return []


def _recorded_probe_shards(own: Path) -> list[str]:
    """probe.shards as run.json has it, if config.yaml names it relative to another working directory."""
    try:
        wanted, recorded = yaml.safe_load(own.read_text())["probe"]["shards"], read_json(own.with_name("run.json"))
        if (path := _where(wanted, recorded["probe_shards"])) != wanted:
            return ["--probe.shards", path]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        pass  # a damaged file has its own message later; without probe.shards there is nothing to find
    return []


def _where(shards: str, recorded: str) -> str:
    """The path of a shard set, or the recorded one if it is only there."""
    gone = "://" not in shards and not Path(shards).exists() and Path(recorded).exists()
    return str(recorded) if gone else shards
