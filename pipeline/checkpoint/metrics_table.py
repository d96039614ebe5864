"""The rows of a run's metrics.jsonl as a table: what reports need of millions of steps, without an object for each."""

import math
import re
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from pipeline.checkpoint.metrics_log import NUMBER, PAIR, Row, parse_row

COLUMNS = ("step", "images", "loss", "learning_rate", "images_per_second")
"""Of each training step."""
STEP = re.compile(
    (
        rf'\{{"step": (0|[1-9][0-9]*), "images": ({NUMBER}), "loss": ({NUMBER}), "learning_rate": ({NUMBER}), '
        rf'{PAIR}, {PAIR}, "images_per_second": ({NUMBER})(?:, {PAIR})*\}}\n'
    ).encode()
)
"""A training step's row in the form in which train writes it, complete. Rows in another form are parsed as JSON, which
takes twice as long."""


@dataclass(frozen=True)
class MetricsTable:
    """The rows of a metrics.jsonl, oldest first."""

    steps: np.ndarray
    """float64 (n, len(COLUMNS)): of each row of a training step; NaN for null."""
    others: list[Row]
    """The other rows: validations, probes, and those of other programs."""

    def column(self, name: str) -> np.ndarray:
        """float64 (n,): one of COLUMNS."""
        return self.steps[:, COLUMNS.index(name)]

    @property
    def losses(self) -> np.ndarray:
        """float64 (m, 2): images seen and loss of the steps with a finite loss."""
        both = np.stack([self.column("images"), self.column("loss")], axis=1)
        return both[np.isfinite(both[:, 1])]

    def last(self, key: str) -> float | None:
        """The newest training loss (`loss`) or value of another key, null excluded; None if there is none."""
        if key == "loss":
            return float(self.losses[-1, 1]) if len(self.losses) else None
        return next((row[key] for row in reversed(self.others) if row.get(key) is not None), None)


def read_table(path: Path) -> MetricsTable:
    """The rows of the file; empty if it does not exist. As `read_rows`, it skips what is not a complete row.

    The table of the last file is kept until the file changes: a report needs it several times.
    """
    if not path.is_file():
        return table_of([])
    state = path.stat()
    return _read(path.absolute(), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=1)
def _read(path: Path, size: int, modified: int) -> MetricsTable:
    numbers: array[float] = array("d")
    others: list[Row] = []
    with path.open("rb") as lines:
        for line in lines:
            if found := STEP.fullmatch(line):
                numbers.extend(map(float, found.groups()))
            elif line.endswith(b"\n") and (row := parse_row(line.decode(errors="replace"))) is not None:
                _add(row, numbers, others)
    return _table(numbers, others)


def table_of(rows: Iterable[Row]) -> MetricsTable:
    """The table of rows that were read."""
    numbers: array[float] = array("d")
    others: list[Row] = []
    for row in rows:
        _add(row, numbers, others)
    return _table(numbers, others)


def _add(row: Row, numbers: "array[float]", others: list[Row]) -> None:
    found = [row.get(name) for name in COLUMNS]
    is_step = "loss" in row and all(one is None or isinstance(one, int | float) for one in found)
    if is_step:
        numbers.extend(math.nan if number is None else float(number) for number in found)
    if not is_step or any(key.startswith("valid_") for key in row):
        others.append(row)


def _table(numbers: "array[float]", others: list[Row]) -> MetricsTable:
    return MetricsTable(np.frombuffer(numbers, np.float64).reshape(-1, len(COLUMNS)), others)
