"""Reads and truncates a run's metrics.jsonl and skipped.jsonl: one JSON object a line, each with a step.

NaN and Inf are written as null. Steps only rise, so what concerns the last steps is read from the end: a long run has
hundreds of megabytes of rows.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_prep.common.files import flush_to_disk, to_json

METRICS_FILE = "metrics.jsonl"
SKIPPED_FILE = "skipped.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

DECODER = json.JSONDecoder(parse_constant=lambda _: None)
"""Reads NaN and Infinity, as earlier versions wrote them, as None."""
BLOCK_BYTES = 1 << 18
"""Bytes that are read at once from the end of a file."""
NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?"
"""As JSON has it."""
PAIR = rf'"(?!valid_)[a-z_]+": (?:{NUMBER}|true|false|null)'
"""A key of a training step's row, and its value."""
STEP_LINE = re.compile(rf'\{{"step": (0|[1-9][0-9]*), {PAIR}(?:, {PAIR})*\}}\n')
"""A complete row of a training step in the form in which train writes it: its step is known without parsing."""

Row = dict[str, Any]


def to_line(row: Row) -> str:
    """The row as a line of the file; NaN and Inf become null, in its lists and objects too."""
    return to_json(row) + "\n"


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of the file, oldest first, with None for null; no rows if the file does not exist.

    Incomplete lines, and lines that are not rows, are skipped.
    """
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.endswith("\n") and (row := parse_row(line)) is not None:
                yield row


def read_last_row(path: Path, key: str, tail_bytes: int = 1 << 26) -> Row | None:
    """The last row with `key` in the last `tail_bytes` of the file; None if there is none."""
    return next(read_backwards(path, key, tail_bytes), None)


def read_backwards(path: Path, key: str, tail_bytes: int = 1 << 26) -> Iterator[Row]:
    """The rows with `key` in the last `tail_bytes` of the file, newest first."""
    quoted = json.dumps(key).encode()
    for _, line in _lines_backwards(path, tail_bytes):
        row = parse_row(line.decode(errors="replace")) if quoted in line else None  # most lines need not be parsed
        if row is not None and key in row:
            yield row


def drop_rows_after(path: Path, step: int) -> None:
    """Truncates the file after its last row of `step` or an earlier one, and so an incomplete last line too."""
    if not path.exists():
        return
    size = path.stat().st_size
    end = size
    for start, line in _lines_backwards(path, size):
        row = parse_row(line.decode(errors="replace"))
        if not line.endswith(b"\n") or (row is not None and row["step"] > step):
            end = start
        elif row is not None and _is_step(row):
            break
    if end < size:
        os.truncate(path, end)
        flush_to_disk(path)


def lines_until(path: Path, step: int) -> Iterator[str]:
    """The complete lines up to a step, unchanged."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if found := STEP_LINE.fullmatch(line):
                if int(found[1]) <= step:
                    yield line
            elif line.endswith("\n") and (row := parse_row(line)) is not None and row["step"] <= step:
                yield line


def last_steps(run: Path, step: int, count: int) -> list[Row]:
    """The rows of the last `count` applied steps up to `step`, including skipped steps between them."""
    last: list[Row] = []
    applied = 0
    for row in read_backwards(run / METRICS_FILE, "loss"):
        if not _is_step(row) or row["step"] > step:
            continue
        applied += row["applied"]
        if applied > count:
            break
        last.append(row)
    return last[::-1]


def _is_step(row: Row) -> bool:
    """Whether it is the row of a training step; other programs may add rows of their own."""
    return "loss" in row and "applied" in row


def _lines_backwards(path: Path, tail_bytes: int) -> Iterator[tuple[int, bytes]]:
    """The lines of the last `tail_bytes`, the last one first, each with its offset; the first one may be cut."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        position, rest = file.seek(0, os.SEEK_END), b""
        first = max(0, position - tail_bytes)
        while position > first:
            start = max(first, position - BLOCK_BYTES)
            file.seek(start)
            parts = (file.read(position - start) + rest).split(b"\n")
            lines = [part + b"\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])
            rest = lines[0] if lines and start > first else b""  # it begins in the block before
            offset = start + sum(map(len, lines))
            for line in reversed(lines[bool(rest) :]):
                offset -= len(line)
                yield offset, line
            position = start


def parse_row(line: str) -> Row | None:
    """The row of a line; None if it is not a row."""
    with suppress(ValueError):
        row = DECODER.decode(line)
        return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
    return None
