"""The default section of a task in the report, built from its JSON."""

from pathlib import Path
from typing import Any

from pipeline.results.headline import is_table
from pipeline.results.report.html import render
from pipeline.results.text import number, percent, words

PROVENANCE = (
    "format", "version", "task", "checkpoint_step", "model_digest", "weights", "dataset", "dataset_digest",
    "palette_sha256", "seed", "command", "options", "inputs_digest", "seconds", "title", "summary", "headlines",
    "confusion",
)  # fmt: skip
"""Keys that the list of numbers excludes."""
SHORT_LIST = 12


def generic_section(result: dict[str, Any], folder: Path) -> str:
    """HTML with the summary, the PNGs whose names start with the task's, lists of objects as tables, and all numbers.

    The numbers are collapsed. Lists longer than SHORT_LIST are excluded.
    """
    numbers = {key: value for key, value in result.items() if key not in PROVENANCE}
    return render(
        "generic_section.html",
        title=result.get("title") or words(result["task"]).capitalize(),
        summary=result.get("summary"),
        figures=sorted(folder.glob(f"{result['task']}*.png")),
        tables=[_table_of(key, value) for key, value in numbers.items() if is_table(value)],
        numbers=[[words(key), value] for key, value in _flat(numbers) if value],
    )


def _table_of(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The table of a list of objects with its name: one column for each plain value, text first."""
    keys = [key for key, value in rows[0].items() if not isinstance(value, (dict, list))]
    text = [key for key in keys if isinstance(rows[0][key], str)]
    keys = text + [key for key in keys if key not in text]
    shown = [[_shown(key, row.get(key)) for key in keys] for row in rows]
    return {"name": words(name), "head": [words(key) for key in keys], "rows": shown, "text": len(text)}


def _shown(key: str, value: Any) -> str:
    return percent(value) if "accuracy" in key and isinstance(value, float) else number(value)


def _flat(value: Any, key: str = "") -> list[tuple[str, str]]:
    """(path of keys, text) of every number and short list within an object."""
    if isinstance(value, dict):
        return [pair for name, part in value.items() for pair in _flat(part, f"{key} {name}".strip())]
    if isinstance(value, list):
        if len(value) > SHORT_LIST or any(isinstance(part, (list, dict)) for part in value):
            return []
        return [(key, ", ".join(_shown(key, part) for part in value))]
    return [(key, _shown(key, value))]
