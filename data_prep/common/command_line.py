"""Shared by both command lines: parsing into dataclasses, errors in one sentence, exit codes."""

import logging
import os
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from itertools import compress, pairwise
from operator import not_
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from data_prep.common.exit_codes import FAILED, INTERRUPTED, USER_ERROR, Failed
from data_prep.common.invalid_options import invalid_option, name_missing_options
from data_prep.common.logs import FLAGS_HELP, configure_logging, open_closed_streams, split_flags

logger = logging.getLogger(__name__)

TRACEBACK_VARIABLE = "IGPT_TRACEBACK"

Command = Callable[[list[str]], int | None]
"""Takes the arguments that follow the command's name, returns the exit code; None is 0."""
Options = TypeVar("Options")


def new_parser(prog: str, description: str) -> ArgumentParser:
    """A parser that raises its errors, so that they are printed as one sentence.

    Its --help shows the docstrings below the fields of dataclasses.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return ArgumentParser(
        prog=prog, description=description, epilog=FLAGS_HELP, exit_on_error=False, allow_abbrev=False
    )


def parse(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """Parses and instantiates. Raises ValueError, one sentence, for invalid input."""
    files = [_read_config(path) for path in values_of("--config", arguments)]
    try:
        namespace = parser.parse_args(_config_first(arguments))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return parser.instantiate(namespace)
    except (ArgumentError, TypeError) as error:
        sentence = invalid_option(parser, files, arguments)
        if sentence is None and isinstance(error, TypeError):
            raise
        sentence = sentence or name_missing_options(parser, " ".join(str(error).split()))
        raise ValueError(f"{sentence} (see {parser.prog} --help)") from error


def fill(dataclass: type[Options], parsed: Namespace) -> Options:
    """An instance of the dataclass; each field takes the parsed option of the same name."""
    return dataclass(**{field.name: parsed[field.name] for field in fields(dataclass)})  # type: ignore[arg-type]


def value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """The value of the first occurrence of a flag, read before any parsing."""
    return next(values_of(flag, arguments), None)


def values_of(flag: str, arguments: Sequence[str]) -> Iterator[str]:
    """The value of each occurrence of a flag, `--flag value` or `--flag=value`, read before any parsing."""
    for here, following in pairwise([*arguments, ""]):
        if here == flag:
            yield following
        elif here.startswith(f"{flag}="):
            yield here.removeprefix(f"{flag}=")


def _config_first(arguments: Sequence[str]) -> list[str]:
    """Moves `--config FILE` to the front, so that the options override the file wherever `--config` is."""
    words = list(pairwise(["", *arguments]))
    of_config = ["--config" in (before, word) or word.startswith("--config=") for before, word in words]
    return [*compress(arguments, of_config), *compress(arguments, map(not_, of_config))]


def _read_config(path: str) -> dict[str, Any]:
    """The content of a configuration file. Raises ValueError if it is not one."""
    if not Path(path).is_file():
        raise ValueError(f"--config is {path!r}, which is not a file; it must be a YAML file, see configs/.")
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
    if content is None:
        raise ValueError(f"{path} is empty; it must contain keys and values, see configs/ for examples.")
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} contains a {type(content).__name__}; it must contain keys and values, see configs/ for examples."
        )
    return content


def print_error(error: BaseException, where: str = "") -> None:
    """Prints the error as one sentence on standard error, if that was not closed."""
    with suppress(OSError):
        print(f"error: {_describe(error)}{where}", file=sys.stderr, flush=True)


def _run(command: Command | str, arguments: list[str], report: Callable[[BaseException], None]) -> int:
    """Runs a command, given as a function or as "module:function", and returns its exit code.

    Invalid input (ValueError, OSError) is reported in one sentence and gives exit code 2, Failed likewise 1. With
    IGPT_TRACEBACK=1 they are raised instead, with their traceback.
    """
    try:
        function: Command = resolve_name(command) if isinstance(command, str) else command
        return function(arguments) or 0
    except (ValueError, OSError, Failed) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        report(error)
        return FAILED if isinstance(error, Failed) else USER_ERROR
    except KeyboardInterrupt:
        logger.warning("interrupted; run the same command to resume from what is complete.")
        return INTERRUPTED


def _describe(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return " ".join(str(error).split())


def dispatch(
    package: str,
    description: str,
    commands: dict[str, tuple[str, Command | str]],
    leave: Callable[[int], NoReturn] = sys.exit,
    report: Callable[[BaseException], None] = print_error,
) -> NoReturn:
    """Runs `python -m package COMMAND arguments...`. `commands` maps a name to (one-line help, command).

    A command is a function, or "module:function" of the package, which is imported when the command is called.
    leave: called with the exit code; that of an unexpected error is 1, after its traceback. report: prints the error of
    invalid input.
    """
    open_closed_streams()
    prog, (level, arguments) = f"python -m {package}", split_flags(sys.argv[1:])
    configure_logging(level)
    width = max(map(len, commands))
    usage = f"usage: {prog} COMMAND [options]\n\n{description}\n\ncommands:\n" + "\n".join(
        f"  {name:<{width}}  {help_line}" for name, (help_line, _) in commands.items()
    )
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage + f"\n\n{prog} COMMAND --help lists a command's options.\n{FLAGS_HELP}")
        sys.exit(0 if arguments else USER_ERROR)
    name, rest = arguments[0], arguments[1:]
    if name not in commands:
        print_error(ValueError(f"{name!r} is not a command of {prog}; it must be one of {', '.join(commands)}."))
        sys.exit(USER_ERROR)
    _, command = commands[name]
    try:
        code = _run(f"{package}.{command}" if isinstance(command, str) else command, rest, report)
    except Exception:
        sys.excepthook(*sys.exc_info())  # the traceback; `leave` decides how the process ends
        code = FAILED
    leave(code)
