"""What both command lines share: parsing into dataclasses, one-sentence errors, exit codes."""

import os
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from data_prep.common.exit_codes import INTERRUPTED, USER_ERROR
from data_prep.common.invalid_options import invalid_option

TRACEBACK_VARIABLE = "IGPT_TRACEBACK"


def new_parser(prog: str, description: str) -> ArgumentParser:
    """A parser whose errors come as exceptions, to be printed as one sentence.

    Its --help shows the docstrings below the fields of dataclasses.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)


def parse(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """Parses and instantiates. Raises ValueError with one sentence for invalid input."""
    file = _read_config(value_of("--config", arguments))
    try:
        namespace = parser.parse_args(_config_first(arguments))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return parser.instantiate(namespace)
    except (ArgumentError, TypeError) as error:
        sentence = invalid_option(parser, file, arguments)
        if sentence is None and isinstance(error, TypeError):
            raise
        raise ValueError(f"{sentence or ' '.join(str(error).split())} (see {parser.prog} --help)") from error


def value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """What follows a flag, as `--flag value` or `--flag=value`, before any parsing."""
    for here, following in pairwise([*arguments, ""]):
        if here == flag:
            return following
        if here.startswith(f"{flag}="):
            return here.removeprefix(f"{flag}=")
    return None


def _config_first(arguments: Sequence[str]) -> list[str]:
    """Moves `--config FILE` to the front: the command line overrides the file, wherever it stands."""
    moved: list[str] = []
    rest = list(arguments)
    while "--config" in rest[:-1]:
        place = rest.index("--config")
        moved += rest[place : place + 2]
        del rest[place : place + 2]
    joined = [argument for argument in rest if argument.startswith("--config=")]
    return moved + joined + [argument for argument in rest if argument not in joined]


def _read_config(path: str | None) -> dict[str, Any]:
    """The content of a configuration file; empty without one. Raises ValueError if it can't be one."""
    if path is None:
        return {}
    if not Path(path).is_file():
        raise ValueError(f"--config is {path!r}, which is no file; it must be a YAML file, see configs/.")
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
    if content is None:
        raise ValueError(f"{path} is empty; it must hold keys and values, see configs/ for examples.")
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, not keys and values; see configs/ for examples.")
    return content


def print_error(error: BaseException, where: str = "") -> None:
    """Prints the error as one sentence on standard error."""
    print(f"error: {_describe(error)}{where}", file=sys.stderr, flush=True)


def run_command(
    command: Callable[[], int | None],
    leave: Callable[[int], NoReturn] = sys.exit,
    report: Callable[[BaseException], None] = print_error,
) -> NoReturn:
    """Leaves with the command's code; invalid input (ValueError, OSError) prints one sentence and exits 2.

    Set IGPT_TRACEBACK=1 to see where an error came from.
    """
    try:
        code = command() or 0
    except (ValueError, OSError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        report(error)
        code = USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from what is complete.", file=sys.stderr, flush=True)
        code = INTERRUPTED
    leave(code)


def _describe(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return " ".join(str(error).split())


def dispatch(
    prog: str,
    description: str,
    commands: dict[str, tuple[str, Callable[[list[str]], Any]]],
    leave: Callable[[int], NoReturn] = sys.exit,
    report: Callable[[BaseException], None] = print_error,
) -> NoReturn:
    """`prog COMMAND arguments...`: commands maps a name to (one-line help, function of the remaining arguments)."""
    arguments = sys.argv[1:]
    width = max(map(len, commands))
    usage = f"usage: {prog} COMMAND [options]\n\n{description}\n\ncommands:\n" + "\n".join(
        f"  {name:<{width}}  {help_line}" for name, (help_line, _) in commands.items()
    )
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage + f"\n\n{prog} COMMAND --help lists a command's options.")
        sys.exit(0 if arguments else USER_ERROR)
    name, rest = arguments[0], arguments[1:]
    if name not in commands:
        print(
            f"error: {name!r} is no command of {prog}; it must be one of {', '.join(commands)}.",
            file=sys.stderr,
        )
        sys.exit(USER_ERROR)
    run_command(lambda: commands[name][1](rest), leave, report)
