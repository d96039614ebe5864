"""Finds the option that jsonargparse rejected, and names the key, the value and what would be valid.

jsonargparse's errors have only text. So after parsing has failed, the options are checked here one by one against the
parser's type hints.
"""

from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser

TYPE_NAMES: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list in brackets",
}


def invalid_option(parser: ArgumentParser, files: Sequence[dict[str, Any]], arguments: Sequence[str]) -> str | None:
    """The error of the first invalid option in the configuration files' contents or on the command line."""
    hints = {action.dest: getattr(action, "_typehint", None) for action in parser._actions}
    in_files = (option for content in files for option in _in_mapping(content, hints))
    for key, value in [*in_files, *_on_command_line(parser, arguments, hints)]:
        if key not in hints:
            near = get_close_matches(key, hints, n=1)
            return f"{key} is not a known key" + (f"; did you mean {near[0]}?" if near else "")
        found = "null" if value is None else repr(value)
        if hints[key] is not None and not _fits(value, hints[key]):
            return _invalid_entry(key, value, hints[key]) or f"{key} is {found}; it must be {expected(hints[key])}"
        if not isinstance(value, dict) and _is_group(key, hints):
            return f"{key} is {found}; it must be keys and values"
    return None


def name_missing_options(parser: ArgumentParser, message: str) -> str:
    """A parser's message, in which required options that are missing are spelled as on the command line."""
    before, required, keys = message.partition("are required: ")
    flags = {action.dest: action.option_strings[0] for action in parser._actions if action.option_strings}
    return before + required + ", ".join(flags.get(key, key) for key in keys.split(", "))


def expected(hint: Any) -> str:
    """A description of the values of this type, to follow "it must be"."""
    arguments = get_args(hint)
    if get_origin(hint) is Literal:
        return "one of " * (len(arguments) > 1) + ", ".join(map(str, arguments))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(expected(part) for part in arguments if part is not NoneType)
    if get_origin(hint) is tuple:
        return f"[{', '.join(map(expected, arguments))}]"
    if (entry := _entry_type(hint)) is not None:
        keys = (f"{name}: {expected(part)}" for name, part in get_type_hints(entry).items())
        return f"a list of {{{', '.join(keys)}}}"
    return TYPE_NAMES.get(get_origin(hint) or hint, "of another type")


def _entry_type(hint: Any) -> Any:
    """The dataclass of the entries, if the type is a list of them, or null; else None."""
    for part in (hint, *get_args(hint)):
        entry = get_args(part)[0] if get_origin(part) is list else None
        if is_dataclass(entry):
            return entry
    return None


def _invalid_entry(key: str, value: Any, hint: Any) -> str | None:
    """The error of the first invalid entry of a list of dataclasses; None if the value is no such list."""
    entry_type = _entry_type(hint)
    entries = _parsed(value) if isinstance(value, _Text) else value
    if entry_type is None or not isinstance(entries, list):
        return None
    hints = get_type_hints(entry_type)
    for number, entry in enumerate(entries):
        name = f"{key}[{number}]"
        if not isinstance(entry, dict):
            return f"{name} is {entry!r}; it must be keys and values, {' and '.join(hints)}"
        for unknown in (part for part in entry if part not in hints):
            return f"{name}.{unknown} is not a known key; an entry has {' and '.join(hints)}"
        for part, part_hint in hints.items():
            if part not in entry:
                return f"{name}.{part} is missing; it must be {expected(part_hint)}"
            if not _fits(entry[part], part_hint):
                return f"{name}.{part} is {entry[part]!r}; it must be {expected(part_hint)}"
    return None


def _parsed(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def _is_group(key: str, hints: dict[str, Any]) -> bool:
    return any(other.startswith(f"{key}.") for other in hints)


def _in_mapping(content: dict[str, Any], hints: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values; a group's keys one by one."""
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and _is_group(key, hints):
            yield from _in_mapping(value, hints, f"{key}.")
        else:
            yield key, value


def _on_command_line(
    parser: ArgumentParser, arguments: Sequence[str], hints: dict[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Keys and values of the options `--key value` and `--key=value`; flags that take no value are skipped."""
    options = {option: action for action in parser._actions for option in action.option_strings}
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name not in options:
            if name.startswith("--"):
                yield name.removeprefix("--"), None
        elif options[name].nargs != 0:
            key, text = options[name].dest, _Text(value if equals else next(rest, ""))
            yield from _in_mapping({key: _of_group(text) if _is_group(key, hints) else text}, hints)


def _of_group(text: "_Text") -> "dict[str, Any] | _Text":
    """The keys and values of a group, from YAML or from the YAML file that the text names; else the text itself."""
    try:
        content = yaml.safe_load(text)
        if isinstance(content, str):
            content = yaml.safe_load(Path(content).read_text())
    except (yaml.YAMLError, UnicodeDecodeError, OSError):
        return text
    return content if isinstance(content, dict) else text


class _Text(str):
    """An unparsed value from the command line."""


def _fits(value: Any, hint: Any) -> bool:
    if value is None:
        return NoneType in get_args(hint)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        if isinstance(value, _Text):
            parser.parse_args([f"--value={value}"])
        else:
            parser.parse_object({"value": value})
    except ArgumentError:
        return False
    return True
