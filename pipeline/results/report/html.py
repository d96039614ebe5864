"""The few pieces that the reports are built of: tables, figures inside the page, numbers as text."""

import base64
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from data_prep.common.files import atomic_write

TEMPLATE = Path(__file__).with_name("report_template.html")
MISSING = "–"


def write_page(path: Path, title: str, sections: Sequence[str]) -> None:
    """Writes a page that needs no other file; empty sections are left out."""
    body = "\n".join(section for section in sections if section)
    with atomic_write(path) as temporary:
        temporary.write_text(Template(TEMPLATE.read_text()).substitute(title=escape(title), body=body))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, ours: Sequence[int] = (), text: int = 1) -> str:
    """A table of plain text: the first `text` columns to the left, the others numbers, to the right.

    ours: the rows to stress.
    """

    def cells(row: Sequence[str], tag: str) -> str:
        marks = [""] * text + [' class="number"'] * (len(row) - text)
        return "".join(f"<{tag}{mark}>{escape(cell)}</{tag}>" for cell, mark in zip(row, marks, strict=True))

    body = "".join(
        f"<tr{' class=ours' if number in ours else ''}>{cells(row, 'td')}</tr>" for number, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><tr>{cells(head, "th")}</tr>{body}</table></div>'


def figure(path: Path, alternative: str, caption: str) -> str:
    """A PNG inside the page; nothing if it is not there."""
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img alt="{escape(alternative)}" src="data:image/png;base64,{data}">'
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{image}{below}</figure>"


def note(text: str) -> str:
    """A paragraph of small print."""
    return f'<p class="note">{escape(text)}</p>'


def percent(fraction: float | None, error: float | None = None) -> str:
    """0.8475 as "84.8 %", with the error after it where there is one."""
    if fraction is None:
        return MISSING
    return f"{100 * fraction:.1f} %" + ("" if error is None else f" ± {100 * error:.1f}")


def number(value: Any) -> str:
    """A number as a reader wants it; what is none, as it is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return MISSING if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if math.isfinite(value) else MISSING


def words(key: str) -> str:
    """A key of JSON as words: best_layer as "best layer"."""
    return key.replace("_", " ")
