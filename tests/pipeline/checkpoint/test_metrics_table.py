"""The table of a run's rows is that of all rows parsed one by one, whatever form they are in."""

import json
from pathlib import Path

import numpy as np

from pipeline.checkpoint.metrics_log import read_rows, to_line
from pipeline.checkpoint.metrics_table import COLUMNS, STEP, read_table, table_of


def step_row(step: int, loss: float | None) -> dict[str, object]:
    rates = {"images_per_second": 1234.5, "tokens_per_second": 1.5e-07, "mfu": 0.25}
    grad_norm = {
        "learning_rate": 3e-05,
        "grad_norm": float("inf") if loss is None else 0.5,
        "applied": loss is not None,
    }
    return {"step": step, "images": 128 * step, "loss": loss, **grad_norm, **rates, "data_wait": 0.0}


def test_the_table_is_that_of_the_rows(tmp_path: Path) -> None:
    rows = [step_row(step, None if step == 3 else 2.0 + 1e-7 * step) for step in range(1, 8)]
    lines = [to_line(row) for row in rows]
    assert [bool(STEP.fullmatch(line.encode())) for line in lines] == [row["loss"] is not None for row in rows], (
        "the rows that train writes are read without JSON"
    )
    lines.insert(3, to_line({"step": 3, "images": 384, "valid_loss": 1.5, "valid_loss_by_set": {"a": 1.0}}))
    lines.insert(5, json.dumps({"step": 4, "images": 512, "loss": float("nan"), "applied": False}) + "\n")
    lines.insert(6, json.dumps({"loss": 7.0, "images": 600, "step": 4, "images_per_second": 9}) + "\n")
    lines.insert(7, lines[4][:60] + lines[4])
    lines.insert(8, lines[4].replace("2.0", "2..0"))
    lines.insert(9, "not a row\n")
    lines.insert(10, lines[4].replace("1.5e-07", "5.\0\0") + lines[4].replace("1234.5", "01234.5"))
    lines.insert(11, lines[4].replace('"loss": 2.0', '"loss": Infinity, "was": 2.0'))
    others = [{"step": 9, "images": 1, "loss": "low"}, {"step": 9, "images": 1, "loss": {"a": 1.0}}]
    others.append(step_row(9, 1.5) | {"images": 1, "valid_loss": 1.5})  # it is a step too
    lines += map(to_line, others)
    lines += [to_line({"step": 9, "images": 1, "loss": 1.0, "note": "images_per_second"}), lines[-1][:-1]]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(lines))
    found, expected = read_table(path), table_of(read_rows(path))
    assert np.array_equal(found.steps, expected.steps, equal_nan=True)
    assert found.others == expected.others == [json.loads(lines[3]), *others]
    assert found.column("images").tolist() == [128, 256, 384, 512, 512, 600, 512, 640, 768, 896, 1, 1]
    assert found.losses[:, 1].tolist() == [row["loss"] for row in read_rows(path) if isinstance(row.get("loss"), float)]
    assert (found.last("loss"), found.last("valid_loss"), found.last("valid_loss_ema")) == (1.0, 1.5, None)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(to_line(step_row(1, 2.0)))
    assert len(read_table(path).steps) == 1
    with path.open("a") as rows:
        rows.write(to_line(step_row(2, 1.0)))
    assert read_table(path).losses[:, 1].tolist() == [2.0, 1.0]


def test_a_run_without_rows(tmp_path: Path) -> None:
    table = read_table(tmp_path / "metrics.jsonl")
    assert table.steps.shape == (0, len(COLUMNS)) and table.others == [] and table.last("loss") is None
