"""What both command lines share: parsing into dataclasses, one-sentence errors, exit codes (contract 10)."""

import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

USER_ERROR = 2
TRACEBACK_VARIABLE = "IGPT_TRACEBACK"


def new_parser(prog: str, description: str) -> ArgumentParser:
    """A parser whose errors come as exceptions, to be printed as one sentence."""
    return ArgumentParser(prog=prog, description=description, exit_on_error=False)


def parse(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """Parses and instantiates. Raises ValueError with one sentence for a user's mistake."""
    from argparse import ArgumentError

    try:
        namespace = parser.parse_args(list(arguments))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return parser.instantiate(namespace)
    except ArgumentError as error:
        raise ValueError(_one_sentence(str(error)) + f" (see {parser.prog} --help)") from error


def _one_sentence(message: str) -> str:
    """jsonargparse's multi-line report as one sentence that names the key, the value and what fits."""
    message = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", message).replace("typing.", "")
    union = re.search(r'Parser key "([^"]+)":.*?Subtypes: \[(.*?)\]\n.*Given value: (.*)$', message, re.S)
    if union:
        key, subtypes, value = union.groups()
        return f"{key} is {value.strip()!r}; it must be one of {' or '.join(subtypes.split(', N'))}".replace(
            "oneType", "nothing"
        )
    simple = re.search(r'Parser key "([^"]+)":\s*Expected (?:a |an )?(.*?)\. Got value: (.*)$', message, re.S)
    if simple:
        key, expected, value = simple.groups()
        return f"{key} is {value.strip()!r}; it must be {expected}"
    return " ".join(message.split())


def run_command(command: Callable[[], int | None]) -> NoReturn:
    """Exits with the command's code; a user's mistake (ValueError, OSError) prints one sentence and exits 2.

    Only rank 0 speaks: under torchrun or srun every rank meets the same mistake.
    Set IGPT_TRACEBACK=1 to see where an error came from.
    """
    try:
        code = command() or 0
    except (ValueError, OSError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0:
            print(f"error: {_describe(error)}", file=sys.stderr, flush=True)
        code = USER_ERROR
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _describe(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return " ".join(str(error).split())


def dispatch(prog: str, description: str, commands: dict[str, tuple[str, Callable[[list[str]], Any]]]) -> NoReturn:
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
        print(f"error: {name!r} is no command of {prog}; it must be one of {', '.join(commands)}.", file=sys.stderr)
        sys.exit(USER_ERROR)
    run_command(lambda: commands[name][1](rest))
