"""`python -m pipeline publish`: publishes a model and its results to a hub or to a folder.

Slow imports happen after the options are parsed.
"""

import logging
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from data_prep.common.command_line import new_parser, parse
from pipeline.hub import HUB, check_dataset, parse_name
from pipeline.model_folder.licenses import check_license
from pipeline.model_folder.resolve import model_folder

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from pipeline.publish.push import Pushed

DIR = "dir:"


@dataclass(frozen=True, kw_only=True)
class Options:
    """The destination, and metadata for the card."""

    to: str
    """hub:ORG/NAME, or dir:PATH for a folder with the same files."""
    results: Path | None = None
    """The results folder that `evaluate` wrote for this model."""
    public: bool = False
    """Make a new repository public; the default is private."""
    license: str | None = None
    """The hub's identifier of the license, such as mit; without one, the card states that none is named."""
    dataset: str | None = None
    """The hub's name of the training dataset, ORG/NAME."""
    retry_minutes: float = 15.0
    """How many minutes to retry if the hub is busy or unreachable."""


def publish_command(arguments: list[str]) -> int:
    """`publish SOURCE [--results RESULTS] --to hub:ORG/NAME|dir:PATH`. Raises ValueError for invalid input."""
    source, options = _parse(arguments)
    kind, target = _target(options.to)
    if kind == HUB:
        _to_hub(source, options, target)
    else:
        _to_folder(source, options, Path(target))
    return os.EX_OK


def _to_folder(source: Path, options: Options, target: Path) -> None:
    from pipeline.model_folder.card import write_card
    from pipeline.publish.assemble import publish_to_folder

    card = partial(write_card, name=target.resolve().name, license_id=options.license, dataset=options.dataset)
    publish_to_folder(model_folder(source), options.results, target, card)
    logger.info(f"published to {target}")


def _to_hub(source: Path, options: Options, name: str) -> None:
    from pipeline.model_folder.card import write_card
    from pipeline.publish.assemble import assemble, step_of
    from pipeline.publish.push import check_login, push

    repository, revision = parse_name(name)
    if revision is not None:
        raise ValueError(f"--to is {HUB}{name}; remove the revision, since publish sets the tag of the step itself.")
    check_login(repository)
    model = model_folder(source)
    card = partial(write_card, name=repository, license_id=options.license, dataset=options.dataset)
    with TemporaryDirectory(prefix="publish-") as temporary:
        folder = Path(temporary)
        assemble(model, options.results, folder, card, link_weights=True)
        step, seconds = step_of(folder), 60 * options.retry_minutes
        pushed = push(folder, repository, step=step, retry_seconds=seconds, public=options.public)
    _log_result(pushed, options.public)


def _log_result(pushed: "Pushed", wanted_public: bool) -> None:
    files = f"{len(pushed.sent)} files" if len(pushed.sent) != 1 else "1 file"
    what = f"sent {files}" if pushed.sent else "nothing to send"
    where = f"{pushed.url}, commit {pushed.commit[:12]}" + (f", tag {pushed.tag}" if pushed.tag else "")
    logger.info(f"published to {where}: {what}; the repository is {'private' if pushed.private else 'public'}")
    if not pushed.on_main:
        logger.info("main stays at a later step")
    if wanted_public and pushed.private:
        logger.info("the repository existed as private, which --public does not change; change it on the hub")


def _parse(arguments: list[str]) -> tuple[Path, Options]:
    parser = new_parser("python -m pipeline publish", "Publishes a model with its results and a card.")
    parser.add_argument("source", nargs="?", help="a run, a checkpoint, a model folder, dir:PATH or hub:ORG/NAME")
    parser.add_argument(
        "--from", dest="from", help="the same as an option: --from dir:PATH uploads what --to dir:PATH wrote"
    )
    parser.add_argument("--public", action="store_true", help="make a new repository public; the default is private")
    parser.add_class_arguments(Options, skip={"public"})
    values = vars(parse(parser, [_current_spelling(argument) for argument in arguments]))
    source, other = values["source"], values["from"]
    if (source is None) == (other is None):
        raise ValueError("Give exactly one model: a run, a checkpoint, a model folder, or --from dir:PATH.")
    options = Options(**{name: values[name] for name in Options.__dataclass_fields__})
    check_license(options.license, "--license")
    check_dataset(options.dataset)
    return Path((source or other).removeprefix(DIR)), options


def _current_spelling(argument: str) -> str:
    """Replaces the option's name of earlier versions, --patience."""
    flag, equals, value = argument.partition("=")
    return f"--retry_minutes{equals}{value}" if flag == "--patience" else argument


def _target(to: str) -> tuple[str, str]:
    """(hub: or dir:, the rest)."""
    for kind in (HUB, DIR):
        if to.startswith(kind) and to != kind:
            return kind, to.removeprefix(kind)
    raise ValueError(f"--to is {to!r}; it must be hub:ORG/NAME or dir:PATH.")
