"""Parses the options of `train`, and of commands that take the same options."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from data_prep.common.command_line import fill, new_parser, parse, value_of
from pipeline.config import TrainConfig


def parse_training(arguments: list[str]) -> tuple[TrainConfig, Path]:
    """The configuration and the run's folder, from the arguments of `train`. Raises ValueError."""
    parser = new_parser("python -m pipeline train", "Train a run, or resume it from its newest complete checkpoint.")
    parsed = parse_run(parser, arguments)
    return fill(TrainConfig, parsed), Path(parsed.run)


def parse_run(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    """Parses the options of `train` in addition to those that the parser already has.

    Without --config, a run that was started before takes the defaults of its options from its own config.yaml. Raises
    ValueError.
    """
    parser.add_argument("--config", action="config", help="A YAML file with the keys below; see configs/.")
    parser.add_argument("--run", type=str, required=True, help="The folder of the run: new, or of a run to resume.")
    parser.add_class_arguments(TrainConfig)
    own = Path(value_of("--run", arguments) or ".") / "config.yaml"
    if value_of("--config", arguments) is None and own.is_file():
        arguments = ["--config", str(own), *arguments]
    return parse(parser, arguments)
