"""Reads and trims a run's metrics.jsonl and skipped.jsonl."""

import json
import sys
from collections import deque
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any

from data_prep.common.files import atomic_write

METRICS_FILE = "metrics.jsonl"


SKIPPED_FILE = "skipped.jsonl"


TENSORBOARD_FOLDER = "tensorboard"


def _with_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no word for what is not a number."""
    return {key: None if isinstance(value, float) and not isfinite(value) else value for key, value in row.items()}


def drop_rows_after(path: Path, step: int) -> None:
    """Rewrites metrics.jsonl without rows beyond `step`, and without a last line that a kill cut short."""
    if not path.exists():
        return
    with atomic_write(path) as temporary, temporary.open("w") as new:
        new.writelines(rows_until(path, step))


def rows_until(path: Path, step: int) -> Iterator[str]:
    """The whole lines of a metrics.jsonl up to a step."""
    with path.open() as lines:
        yield from (line for line in lines if line.endswith("\n") and _step_of(line) <= step)


def last_steps(run: Path, step: int, count: int) -> list[dict[str, Any]]:
    """The rows of the last training steps up to a step, and those of all that were not applied among them."""
    if not (run / METRICS_FILE).exists():
        return []
    kept: deque[dict[str, Any]] = deque()
    applied = 0
    for row in map(json.loads, rows_until(run / METRICS_FILE, step)):
        if "loss" in row:
            kept.append(row)
            applied += row["applied"]
            while applied > count:
                applied -= kept.popleft()["applied"]
    return list(kept)


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return sys.maxsize
