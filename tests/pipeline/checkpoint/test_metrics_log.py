"""metrics.jsonl: every reader meets nulls, and a last line that a kill cut short."""

from math import inf, nan
from pathlib import Path

import pytest

from pipeline.checkpoint.metrics_log import (
    METRICS_FILE,
    drop_rows_after,
    last_steps,
    lines_until,
    read_last_row,
    read_rows,
    to_line,
)

ROWS = [
    {"step": 1, "loss": 2.5, "grad_norm": 1.0, "applied": True},
    {"step": 2, "loss": nan, "grad_norm": inf, "applied": False},
    {"step": 3, "loss": 2.25, "grad_norm": 0.5, "applied": True},
    {"step": 3, "images": 24, "valid_loss": 2.375},
]
NULLS = [ROWS[0], {"step": 2, "loss": None, "grad_norm": None, "applied": False}, *ROWS[2:]]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / METRICS_FILE).write_text("".join(map(to_line, ROWS)) + '{"step": 4, "loss": 2.')
    return tmp_path


def test_rows_have_nulls_and_a_line_cut_short_is_excluded(run: Path) -> None:
    assert list(read_rows(run / METRICS_FILE)) == NULLS
    assert list(read_rows(run / "absent.jsonl")) == []
    assert read_last_row(run / METRICS_FILE, "loss") == NULLS[2]
    assert read_last_row(run / METRICS_FILE, "loss", tail_bytes=160) == NULLS[2]
    assert read_last_row(run / METRICS_FILE, "probe_accuracy") is None


def test_a_number_without_its_line_end_is_no_row(run: Path) -> None:
    """`{"step": 4}` may be all that was written of a longer row, or of a row of step 4 that is written again."""
    with (run / METRICS_FILE).open("a") as file:
        file.write("0}")
    assert list(read_rows(run / METRICS_FILE)) == NULLS


def test_trimming_keeps_the_lines_as_they_were(run: Path) -> None:
    assert list(lines_until(run / METRICS_FILE, 2)) == list(map(to_line, ROWS[:2]))
    drop_rows_after(run / METRICS_FILE, 2)
    assert (run / METRICS_FILE).read_text() == "".join(map(to_line, ROWS[:2]))


def test_last_steps_count_those_that_were_applied(run: Path) -> None:
    assert last_steps(run, 3, 2) == NULLS[:3]
    assert last_steps(run, 3, 1) == NULLS[1:3]
    assert last_steps(run, 2, 1) == NULLS[:2]


def test_numbers_that_an_earlier_version_wrote_as_nan_are_null(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"step": 2, "loss": NaN, "grad_norm": -Infinity, "applied": false}\n')
    assert list(read_rows(tmp_path / METRICS_FILE)) == [NULLS[1]]


def test_nan_within_lists_and_objects_is_null_too(tmp_path: Path) -> None:
    row = {"step": 5, "valid_loss_by_set": {"a": nan, "b": 2.0}, "probe_accuracy_by_layer": [0.5, -inf]}
    line = to_line(row)
    assert "NaN" not in line and "Infinity" not in line
    (tmp_path / METRICS_FILE).write_text(line)
    [found] = read_rows(tmp_path / METRICS_FILE)
    assert found == {"step": 5, "valid_loss_by_set": {"a": None, "b": 2.0}, "probe_accuracy_by_layer": [0.5, None]}
