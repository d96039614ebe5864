"""`python -m pipeline publish`: a model and its results to a hub or to a folder."""

import os
from dataclasses import dataclass
from pathlib import Path

from data_prep.command_line import new_parser, parse
from pipeline.locate import HUB, model_folder

DIR = "dir:"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where to, and what the card should say."""

    to: str
    """hub:ORG/NAME, or dir:PATH for a folder that holds the same."""
    results: Path | None = None
    """The folder that `evaluate` wrote for this model."""
    public: bool = False
    """Let everybody see a repository that this makes; else it is private."""
    license: str | None = None
    """The hub's identifier of the licence, such as mit; a card without one says so."""
    dataset: str | None = None
    """The hub's name of the pictures it was trained on, ORG/NAME."""


def publish_command(arguments: list[str]) -> int:
    """`publish SOURCE [--results RESULTS] --to hub:ORG/NAME|dir:PATH`. Raises ValueError for a user's mistake."""
    source, options = _parse(arguments)
    folder = model_folder(source)
    from pipeline.publish.folder import About, publish_to_folder

    kind, target = _target(options.to)
    if kind == DIR:
        about = About(name=Path(target).resolve().name, license=options.license, dataset=options.dataset)
        publish_to_folder(folder, options.results, Path(target), about)
        print(f"published to {target}")
    return os.EX_OK


def _parse(arguments: list[str]) -> tuple[Path, Options]:
    parser = new_parser("python -m pipeline publish", "Publishes a model, its results and a card.")
    parser.add_argument("source", nargs="?", help="a run, a checkpoint, a model folder, dir:PATH or hub:ORG/NAME")
    parser.add_argument("--from", dest="from", help="the same, named: --from dir:PATH pushes what --to dir:PATH wrote")
    parser.add_argument("--public", action="store_true", help="let everybody see a repository that this makes")
    parser.add_class_arguments(Options, skip={"public"})
    values = vars(parse(parser, arguments))
    source, other = values["source"], values["from"]
    if (source is None) == (other is None):
        raise ValueError("Name one model: a run, a checkpoint or a model folder, or --from dir:PATH.")
    options = Options(**{name: values[name] for name in Options.__dataclass_fields__})
    return Path((source or other).removeprefix(DIR)), options


def _target(to: str) -> tuple[str, str]:
    """(hub: or dir:, what follows)."""
    for kind in (HUB, DIR):
        if to.startswith(kind) and to != kind:
            return kind, to.removeprefix(kind)
    raise ValueError(f"--to is {to!r}; it must be hub:ORG/NAME or dir:PATH.")
