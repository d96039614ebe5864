"""Log lines on standard error, with time, level and rank. Standard output is for a command's result."""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

OWN_LOGGERS = ("data_prep", "pipeline")
COLORS = {logging.DEBUG: "\033[2m", logging.WARNING: "\033[33m", logging.ERROR: "\033[31m"}
RESET = "\033[0m"
TIME = "%Y-%m-%d %H:%M:%S"
FLAGS = {"--quiet": logging.WARNING, "-v": logging.DEBUG, "--verbose": logging.DEBUG}
FLAGS_HELP = "--quiet logs warnings only; -v, --verbose also logs details and the messages of other packages."


def open_closed_streams() -> None:
    """Connects standard input, output and error to /dev/null where the caller closed them (`2>&-`).

    Else the next file that is opened would get the number of the closed one, and messages would be written into it.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115  (for the life of the process)


class Verbosity(NamedTuple):
    """The level that the flags request, and the arguments without the flags."""

    level: int
    arguments: list[str]


def split_flags(arguments: Sequence[str]) -> Verbosity:
    """Removes --quiet, -v and --verbose from a command's arguments; the last of them counts."""
    flags = [argument for argument in arguments if argument in FLAGS]
    level = FLAGS[flags[-1]] if flags else logging.INFO
    return Verbosity(level, [argument for argument in arguments if argument not in FLAGS])


def current_flags() -> list[str]:
    """The flag that gives a command started by this one the same level; none for the default."""
    level = logging.getLogger(OWN_LOGGERS[0]).getEffectiveLevel()
    return [flag for flag, wanted in FLAGS.items() if wanted == level][:1]


def configure_logging(level: int = logging.INFO) -> None:
    """Logs to standard error: this project from `level` on, other packages from WARNING on (INFO if `level` is DEBUG).

    A second call replaces the first.
    """
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
    """Writes to the current sys.stderr, also if it was replaced after `configure_logging`."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr

    def handleError(self, record: logging.LogRecord) -> None:
        """Prints the error, unless the console was closed or is full, which must not end a run."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _Formatter(logging.Formatter):
    """`[2026-01-31 12:00:00 INFO] message`; with several ranks, `INFO rank 0`; colored on a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        rank = os.environ.get("RANK", "") if os.environ.get("WORLD_SIZE", "1") != "1" else ""
        place = f" rank {rank}" if rank else ""
        text = f"[{self.formatTime(record, TIME)} {record.levelname}{place}] {record.getMessage()}"
        if record.exc_info:
            text += f"\n{self.formatException(record.exc_info)}"
        color = COLORS.get(record.levelno) if sys.stderr.isatty() else None
        return f"{color}{text}{RESET}" if color else text
