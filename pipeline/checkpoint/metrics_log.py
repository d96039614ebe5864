"""Reads and truncates a run's metrics.jsonl and skipped.jsonl: one JSON object a line, each with a step.

NaN and Inf are written as null.
"""

import json
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_prep.common.files import atomic_write, to_json

METRICS_FILE = "metrics.jsonl"
SKIPPED_FILE = "skipped.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

Row = dict[str, Any]


def to_line(row: Row) -> str:
    """The row as a line of the file; NaN and Inf become null, in its lists and objects too."""
    return to_json(row) + "\n"


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of the file, oldest first, with None for null; no rows if the file does not exist.

    Incomplete lines, and lines that are not rows, are skipped.
    """
    return (row for _, row in _lines(path))


def read_last_row(path: Path, key: str, tail_bytes: int = 1 << 16) -> Row | None:
    """The last row with `key` in the last `tail_bytes` of the file; None if there is none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - tail_bytes))
        lines = file.read().decode(errors="replace").splitlines()
    rows = (_parse(line) for line in reversed(lines))
    return next((row for row in rows if row is not None and key in row), None)


def drop_rows_after(path: Path, step: int) -> None:
    """Rewrites the file without rows after `step`, and without an incomplete last line."""
    if not path.exists():
        return
    with atomic_write(path) as temporary, temporary.open("w") as new:
        new.writelines(lines_until(path, step))


def lines_until(path: Path, step: int) -> Iterator[str]:
    """The complete lines up to a step, unchanged."""
    return (line for line, row in _lines(path) if row["step"] <= step)


def last_steps(run: Path, step: int, count: int) -> list[Row]:
    """The rows of the last `count` applied steps up to `step`, including skipped steps between them."""
    last: deque[Row] = deque()
    applied = 0
    for row in read_rows(run / METRICS_FILE):
        if "loss" in row and row["step"] <= step:
            last.append(row)
            applied += row["applied"]
            while applied > count:
                applied -= last.popleft()["applied"]
    return list(last)


def _lines(path: Path) -> Iterator[tuple[str, Row]]:
    """Each complete line, with its row."""
    if not path.is_file():
        return
    with path.open(errors="replace") as lines:
        for line in lines:
            row = _parse(line)
            if row is not None and line.endswith("\n"):
                yield line, row


def _parse(line: str) -> Row | None:
    """The row of a line; None if it is not a row."""
    with suppress(ValueError):
        row = json.loads(line, parse_constant=lambda _: None)  # NaN and Infinity, as earlier versions wrote them
        return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
    return None
