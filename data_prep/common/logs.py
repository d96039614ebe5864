"""Log lines on standard error, with time, level and rank. Standard output is for a command's result."""

import logging
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple, TextIO

OWN_LOGGERS = ("data_prep", "pipeline")
COLORS = {logging.DEBUG: "\033[2m", logging.WARNING: "\033[33m", logging.ERROR: "\033[31m"}
RESET = "\033[0m"
TIME = "%Y-%m-%d %H:%M:%S"
FLAGS = {"--quiet": logging.WARNING, "-v": logging.DEBUG, "--verbose": logging.DEBUG}
FLAGS_HELP = "--quiet logs warnings only; -v, --verbose also logs details, and what DeepSpeed and transformers log."


class Verbosity(NamedTuple):
    """The level that the arguments ask for, and the arguments without these flags."""

    level: int
    arguments: list[str]


def split_flags(arguments: Sequence[str]) -> Verbosity:
    """Takes --quiet, -v and --verbose out of a command's arguments; the last of them counts."""
    flags = [argument for argument in arguments if argument in FLAGS]
    level = FLAGS[flags[-1]] if flags else logging.INFO
    return Verbosity(level, [argument for argument in arguments if argument not in FLAGS])


def configure_logging(level: int = logging.INFO) -> None:
    """Sends the records of this project from `level` on to standard error, and those of other packages from WARNING on.

    With level DEBUG, those of other packages from INFO on. A second call replaces the first.
    """
    logging.raiseExceptions = False  # a console that is gone must not end a run
    handler = _StandardError()
    handler.setFormatter(_Formatter())
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old, _StandardError)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.INFO if level == logging.DEBUG else logging.WARNING)
    for name in OWN_LOGGERS:
        logging.getLogger(name).setLevel(level)


class _StandardError(logging.StreamHandler[TextIO]):
    """Writes to what sys.stderr is at the time."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class _Formatter(logging.Formatter):
    """`[2026-01-31 12:00:00 INFO] message`; of several ranks, `INFO rank 0`; in color on a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        place = f" rank {os.environ['RANK']}" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
        text = f"[{self.formatTime(record, TIME)} {record.levelname}{place}] {record.getMessage()}"
        if record.exc_info:
            text += f"\n{self.formatException(record.exc_info)}"
        color = COLORS.get(record.levelno) if sys.stderr.isatty() else None
        return f"{color}{text}{RESET}" if color else text
