"""What the report shows of a task: a row or more in the table of all numbers, and a section.

A task's file may say both itself, else they are made from its JSON:

    headlines(result) -> list[Headline]     without it: each `test_accuracy` in its JSON
    section(result, folder) -> str          HTML, by the pieces of html.py; without it: the summary, the PNGs whose
                                            names begin with the task's, lists of objects as tables, and all numbers
"""

from html import escape
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.results.headline import _is_table, _module, name_of
from pipeline.results.report.html import figure, number, percent, table, words

PROVENANCE = (
    "task", "checkpoint_step", "model_digest", "weights", "dataset", "dataset_digest", "palette_sha256", "seed",
    "command", "options", "inputs_digest", "seconds",
)  # fmt: skip
SHORT_LIST = 12


def section(task: str, result: dict[str, Any], folder: Path) -> str:
    """The task's own, or the generic one, under its heading."""
    module = _module(task)
    own = getattr(module, "section", None)
    body = own(result, folder) if own is not None else _generic(task, result, folder, module)
    return f"<h2>{escape(name_of(task))}</h2>\n{body}"


def _generic(task: str, result: dict[str, Any], folder: Path, module: ModuleType | None) -> str:
    parts = [f"<p>{_sentence(module.summary(result))}</p>"] if module is not None else []
    parts += [figure(path, words(path.stem), "") for path in sorted(folder.glob(f"{task}*.png"))]
    parts += [_table_of(value) for value in result.values() if _is_table(value)]
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
