"""A task's section of the report: the task's own, or made from its JSON."""

from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

from pipeline.results.headline import is_table, title_of
from pipeline.results.report.html import figure, table
from pipeline.results.text import number, percent, words

PROVENANCE = (
    "task", "checkpoint_step", "model_digest", "weights", "dataset", "dataset_digest", "palette_sha256", "seed",
    "command", "options", "inputs_digest", "seconds", "title", "summary", "headlines",
)  # fmt: skip
SHORT_LIST = 12


def section(result: dict[str, Any], folder: Path) -> str:
    """The task's own, or the generic one, under its heading."""
    from pipeline.evaluate.registry import TASKS

    task = result["task"]
    own = getattr(import_module(TASKS[task]), "section", None) if task in TASKS else None
    body = own(result, folder) if own is not None else _generic(result, folder)
    return f"<h2>{escape(title_of(result))}</h2>\n{body}"


def _generic(result: dict[str, Any], folder: Path) -> str:
    """Summary, the PNGs whose names begin with the task's, lists of objects as tables, and all numbers."""
    parts = [f"<p>{_sentence(result['summary'])}</p>"] if result.get("summary") else []
    parts += [figure(path, words(path.stem), "") for path in sorted(folder.glob(f"{result['task']}*.png"))]
    parts += [_table_of(value) for key, value in result.items() if is_table(value) and key not in PROVENANCE]
    parts.append(all_numbers(result))
    return "\n".join(parts)


def _sentence(summary: str) -> str:
    return escape(f"{summary[:1].upper()}{summary[1:]}.")


def _table_of(rows: list[dict[str, Any]]) -> str:
    """A list of objects, a column for each of their plain values, words first."""
    keys = [key for key, value in rows[0].items() if not isinstance(value, (dict, list))]
    text = [key for key in keys if isinstance(rows[0][key], str)]
    keys = text + [key for key in keys if key not in text]
    shown = [[_shown(key, row.get(key)) for key in keys] for row in rows]
    return table([words(key) for key in keys], shown, text=len(text))


def _shown(key: str, value: Any) -> str:
    return percent(value) if "accuracy" in key and isinstance(value, float) else number(value)


def all_numbers(result: dict[str, Any]) -> str:
    """A folded table of every number and short list of a result; long lists stand in the JSON alone."""
    rows = [
        (words(key), value)
        for key, value in _flat({name: part for name, part in result.items() if name not in PROVENANCE})
    ]
    shown = [[key, value] for key, value in rows if value]
    if not shown:
        return ""
    return f"<details><summary>All numbers</summary>{table(['', 'value'], shown)}</details>"


def _flat(value: Any, key: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [pair for name, part in value.items() for pair in _flat(part, f"{key} {name}".strip())]
    if isinstance(value, list):
        if len(value) > SHORT_LIST or any(isinstance(part, (list, dict)) for part in value):
            return []
        return [(key, ", ".join(_shown(key, part) for part in value))]
    return [(key, _shown(key, value))]
