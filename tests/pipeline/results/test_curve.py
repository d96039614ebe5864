"""The training curve: grouped, and drawn without what is not finite, which is null in metrics.jsonl."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.checkpoint.metrics_log import Row
from pipeline.checkpoint.metrics_table import table_of
from pipeline.results.curve import describe_curve, draw_curve, has_losses, summarized, valid_loss_at


def training_rows(steps: int) -> list[Row]:
    losses = np.random.default_rng(0).uniform(1, 2, steps)
    return [{"step": step, "images": 10 * step, "loss": float(loss)} for step, loss in enumerate(losses, 1)]


def test_steps_are_grouped_without_null_losses() -> None:
    rows = training_rows(1000)
    rows[7]["loss"] = None
    images, low, mean, high = summarized(table_of([*rows, {"step": 1000, "images": 10000, "valid_loss": 9.0}]))
    finite = [row["loss"] for row in rows if row["loss"] is not None]
    assert len(images) == 120
    assert (np.diff(images) > 0).all()
    assert (low <= mean).all()
    assert (mean <= high).all()
    assert (low.min(), high.max()) == (min(finite), max(finite))
    assert mean.mean() == pytest.approx(np.mean(finite), abs=2e-3)


def test_null_losses_are_not_drawn(tmp_path: Path) -> None:
    rows = training_rows(9)
    valid = [{"step": 3, "images": 30, "valid_loss": 1.5}, {"step": 6, "images": 60, "valid_loss": None}]
    nulls = [row | {"loss": None, "grad_norm": None, "images_per_second": None} for row in rows]
    assert has_losses(table_of([*nulls, rows[0]]))
    assert not has_losses(table_of([*nulls, *valid]))
    draw_curve(table_of([*rows[:4], *valid]), 512, None, tmp_path / "without.png")
    draw_curve(table_of([*rows[:4], *valid[:1]]), 512, None, tmp_path / "finite.png")
    draw_curve(table_of([*rows[:4], *nulls[4:], *valid]), 512, None, tmp_path / "nulls.png")
    images = [(tmp_path / f"{name}.png").read_bytes() for name in ("without", "finite", "nulls")]
    assert images == [images[0]] * 3


def test_a_masked_model_is_not_compared_with_color_counts(tmp_path: Path) -> None:
    rows, counts = training_rows(9), ("uniform_nats_per_color", "unigram_nats_per_color", "bigram_nats_per_color")
    density = {"split": "test", "masked": True} | dict.fromkeys(counts, 9.0)
    draw_curve(table_of(rows), 512, density, tmp_path / "masked.png")
    draw_curve(table_of(rows), 512, None, tmp_path / "without.png")
    assert (tmp_path / "masked.png").read_bytes() == (tmp_path / "without.png").read_bytes()
    assert describe_curve(table_of(rows), density) == describe_curve(table_of(rows), None)
    assert describe_curve(table_of(rows), density | {"masked": False}) != describe_curve(table_of(rows), None)


def test_the_runs_validation_loss_at_a_step() -> None:
    rows = [{"step": 5, "images": 50, "valid_loss": loss} for loss in (1.75, 1.5, None)]
    assert valid_loss_at(table_of([*rows, {"step": 5, "images": 50, "loss": 9.0}]), 5) == 1.5
    assert valid_loss_at(table_of(rows[2:]), 5) is None
    assert valid_loss_at(table_of(rows), 6) is None
    averaged = {"step": 5, "images": 50, "valid_loss": 2.0, "valid_loss_ema": 1.25}
    assert valid_loss_at(table_of([*rows, averaged]), 5, "ema") == 1.25
    assert valid_loss_at(table_of(rows), 5, "ema") is None


def test_the_loss_of_averaged_weights_is_drawn_too(tmp_path: Path) -> None:
    rows = training_rows(9)
    plain = [{"step": step, "images": 10 * step, "valid_loss": 2.0} for step in (3, 6)]
    averaged = [row | {"valid_loss_ema": 1.5 + row["step"] / 10} for row in plain]
    draw_curve(table_of([*rows, *plain]), 512, None, tmp_path / "plain.png")
    draw_curve(table_of([*rows, *averaged]), 512, None, tmp_path / "averaged.png")
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "averaged.png").read_bytes()
    alternative, caption = describe_curve(table_of([*rows, *averaged]), None)
    assert "2.000 on the validation split (2.100 with the moving average of the weights)." in alternative
    assert "there also with the moving average of the weights (EMA); lower is better" in caption
