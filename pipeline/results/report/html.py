"""HTML pages and their elements, rendered by jinja2 from templates/, with all text escaped."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from data_prep.common.files import atomic_write
from pipeline.results.text import words

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.filters |= {"words": words, "base64": lambda path: base64.b64encode(path.read_bytes()).decode()}


def render(template: str, **values: Any) -> str:
    """Renders a file in templates/ to HTML."""
    return _TEMPLATES.get_template(template).render(values)


def write_page(path: Path, template: str, **values: Any) -> None:
    """Writes a self-contained page."""
    page = render(template, **values)
    with atomic_write(path) as temporary:
        temporary.write_text(page)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, ours: Sequence[int] = (), text: int = 1) -> str:
    """A table of plain text: the first `text` columns are left-aligned, the others are right-aligned numbers.

    ours: the rows to highlight.
    """
    return _macro("table", head, rows, ours, text)


def figure(path: Path, alternative: str, caption: str) -> str:
    """A PNG embedded in the page; nothing if the file does not exist."""
    return _macro("figure", path, alternative, caption)


def note(text: str) -> str:
    """A paragraph in small print."""
    return _macro("note", text)


def _macro(name: str, *values: Any) -> str:
    """Returns str, not Markup, which would escape HTML that a caller appends."""
    return str(getattr(_TEMPLATES.get_template("macros.html").module, name)(*values))
