"""The JSON of a task in a results folder: its format, and reading what this and other versions wrote.

Each file has `format`, `version`, the provenance, the task's own numbers, and title, summary and headlines. Versions
before 1 wrote neither `format` nor `version`. What can't be read is named with the reason; it never ends a command.
"""

from pathlib import Path
from typing import Any

from data_prep.common.files import read_json
from pipeline.results.earlier import with_headlines
from pipeline.results.headline import headlines_of

FORMAT, VERSION = "image-gpt-result", 1
"""The values of `format` and `version` in the JSON of a task."""
NEEDED = ("task", "model_digest", "dataset", "dataset_digest", "command")
"""Keys with texts that every reader uses."""


def read_task_files(folder: Path) -> tuple[dict[Path, dict[str, Any]], dict[str, str]]:
    """The content of each task's JSON by its path, with headlines; and, by name, why other results can't be read.

    JSON files that are not results are skipped.
    """
    readable, unreadable = {}, {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = read_json(path)
            if isinstance(content, dict) and is_result(content):
                readable[path] = _checked(content)
        except ValueError as error:
            unreadable[path.name] = str(error).removeprefix(f"{path} ").rstrip(".")
        except OSError as error:
            unreadable[path.name] = f"can't be read ({error.strerror})"
    return readable, unreadable


def is_result(content: dict[str, Any]) -> bool:
    """Whether a JSON object is the result of a task."""
    return content.get("format") == FORMAT or "inputs_digest" in content or {"task", "model_digest"} <= content.keys()


def version_of(content: dict[str, Any]) -> Any:
    """The version of a task's JSON; 0 if it is of a version that did not write it."""
    return content.get("version", 0)


def is_later(content: dict[str, Any]) -> bool:
    """Whether a later version of this program wrote a task's JSON."""
    version = version_of(content)
    return not isinstance(version, int) or version > VERSION


def _checked(content: dict[str, Any]) -> dict[str, Any]:
    """The result with headlines. Raises ValueError with the reason if it can't be shown."""
    if is_later(content):
        raise ValueError(f"has version {version_of(content)} of its format; this program reads up to {VERSION}")
    for key in NEEDED:
        if not isinstance(content.get(key), str):
            raise ValueError(f"has no {key}")
    try:
        result = with_headlines(content)
        for headline in headlines_of(result):
            if not isinstance(headline.text, str) or not isinstance(headline.name, str):
                raise TypeError("the name of a headline is not a text")
        return result
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"has other keys than this program knows ({error!r})") from error
