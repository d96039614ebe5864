"""The few pieces that the reports are built of: tables, figures inside the page, notes."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from data_prep.common.files import atomic_write

TEMPLATE = Path(__file__).with_name("report_template.html")


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
