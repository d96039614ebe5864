"""metrics.jsonl: every reader meets nulls, and a last line that a kill cut short."""

import json
from math import inf, nan
from pathlib import Path

import pytest

from pipeline.checkpoint import metrics_log
from pipeline.checkpoint.metrics_log import (
    METRICS_FILE,
    drop_rows_after,
    last_steps,
    lines_until,
    read_backwards,
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


def test_lines_up_to_a_step_are_unchanged_whatever_their_form(tmp_path: Path) -> None:
    """Those of train, others with lists and objects, and damage, which is excluded; an earlier version's NaN."""
    train = [
        f'{{"step": {step}, "images": {8 * step}, "loss": {loss}, "applied": true}}\n'
        for step, loss in ((1, "2.5"), (2, "NaN"), (10, "2.25"), (11, "2.0"))
    ]
    others = [
        '{"step": 9, "images": 72, "valid_loss_by_set": {"a": 2.0}}\n',
        '{"images": 80, "step": 10, "loss": 1.0}\n',
    ]
    damaged = ['{"step": 3, "images": 24, "lo\n', "\0\0\0\n", '{"step": 2, "images": 16, "loss": 2.5}']
    path = tmp_path / METRICS_FILE
    path.write_text("".join([*train[:2], damaged[0], others[0], damaged[1], train[2], others[1], train[3], damaged[2]]))
    assert list(lines_until(path, 10)) == [*train[:2], others[0], train[2], others[1]]
    assert list(lines_until(path, 1)) == train[:1]


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


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 18])
def test_reading_from_the_end_is_reading_from_the_start_reversed(
    block: int, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_log, "BLOCK_BYTES", block)
    expected = [row for row in read_rows(run / METRICS_FILE) if "loss" in row]
    assert list(read_backwards(run / METRICS_FILE, "loss")) == expected[::-1]
    assert read_last_row(run / METRICS_FILE, "valid_loss") == ROWS[3]
    drop_rows_after(run / METRICS_FILE, 1)
    assert (run / METRICS_FILE).read_text() == to_line(ROWS[0])


def rows_of_a_long_run(steps: int) -> bytes:
    rows = ({"step": step, "images": 8 * step, "loss": 2.0, "applied": True} for step in range(1, steps + 1))
    return "".join(map(to_line, rows)).encode()


def test_the_start_of_a_long_run_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither to drop the last rows nor to read the last steps."""
    path, steps = tmp_path / METRICS_FILE, 20_000
    path.write_bytes(rows_of_a_long_run(steps))
    parsed, parse = [], metrics_log.parse_row
    monkeypatch.setattr(metrics_log, "parse_row", lambda line: parsed.append(line) or parse(line))
    drop_rows_after(path, steps - 50)
    assert [row["step"] for row in last_steps(tmp_path, steps - 50, 3)] == [steps - 52, steps - 51, steps - 50]
    assert len(parsed) < 100
    assert path.read_bytes() == rows_of_a_long_run(steps - 50)


@pytest.mark.parametrize(
    "damage",
    [b"\0" * 400, b"\xff\xfe\n", b'{"step": 3, "loss": 5.0}\n', b"[1, 2]\n", b'{"step": 9, "lo\xff', b"{}\n\n\0\n"],
)
def test_bytes_that_are_no_rows_are_tolerated(damage: bytes, tmp_path: Path) -> None:
    """A machine that crashed, and other programs, leave them behind; steps after the checkpoint are dropped anyway."""
    path, complete = tmp_path / METRICS_FILE, rows_of_a_long_run(30)
    path.write_bytes(complete + damage)
    drop_rows_after(path, 20)
    with path.open("a") as file:
        file.write(to_line({"step": 21, "images": 168, "loss": 1.5, "applied": True}))
    assert [row["step"] for row in read_rows(path)] == list(range(1, 22))
    assert [row["step"] for row in last_steps(tmp_path, 21, 2)] == [20, 21]


def test_a_bad_byte_in_the_middle_costs_no_other_row(tmp_path: Path) -> None:
    path, content = tmp_path / METRICS_FILE, bytearray(rows_of_a_long_run(30))
    content[1000] = 0xFF
    path.write_bytes(content)
    drop_rows_after(path, 25)
    assert len(list(read_rows(path))) in (24, 25)
    assert path.read_bytes() == content[: path.stat().st_size], "the rest is as it was"
    assert json.loads(path.read_bytes().splitlines()[-1])["step"] == 25
