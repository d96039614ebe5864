"""Losses, gradient norms, learning rates and images of short runs are as they were stored."""

import json
from pathlib import Path

import pytest

from tests.golden.curves import (
    CURVES,
    EXACT,
    KINDS,
    LAYOUTS,
    SHARDS,
    changes,
    curve_of,
    exact_changes,
    exact_of,
    read,
    train_curves,
)
from tests.pipeline.conftest import Runner
from tests.pipeline.train.engine.test_offload import needs_compiler

MARKS = {layout: [pytest.mark.slow] for layout in LAYOUTS if layout != "1-rank"}
MARKS |= {layout: [pytest.mark.slow, needs_compiler] for layout in LAYOUTS if layout.startswith("offload")}
ADVICE = "If the change is intended, renew the stored numbers as tests/golden/README.md says."


@pytest.mark.parametrize("layout", [pytest.param(layout, marks=MARKS.get(layout, [])) for layout in LAYOUTS])
def test_curves_are_as_stored(layout: str, tmp_path: Path) -> None:
    runner, stored, exact = train_curves(layout, tmp_path), read(CURVES / f"{layout}.json"), read(EXACT)
    assert list(stored) == KINDS
    sentences = []
    for kind in KINDS:
        found = changes(curve_of(runner, kind), stored[kind])
        found += exact_changes(exact_of(runner, kind), exact[kind.split()[1]])
        sentences += [f"{layout}, {kind}: {sentence}" for sentence in found]
    assert not sentences, "\n".join([*sentences, ADVICE])


def test_a_difference_is_reported_with_its_step() -> None:
    stored = read(CURVES / "1-rank.json")["igpt next_color"]
    for key, factor in (("loss", 1 + 2e-5), ("grad_norm", 1 - 2e-4), ("loss", float("nan"))):
        values = [value * (factor if step == 7 else 1) for step, value in enumerate(stored[key], start=1)]
        [sentence] = changes(stored | {key: values}, stored)
        assert sentence.startswith(f"{key} of step 7 is ")
        assert "; 1 of 20 differ" in sentence
    assert changes(stored, stored) == []
    exact = read(EXACT)["next_color"]
    for key, value in (("learning_rate", exact["learning_rate"][6] + 2e-12), ("tokens", "0" * 16), ("images", 57)):
        values = [value if step == 7 else each for step, each in enumerate(exact[key], start=1)]
        assert exact_changes(exact | {key: values}, exact) == [
            f"{key}: 1 of 20 steps differ, first {value}, stored {exact[key][6]}"
        ]
    assert exact_changes(exact, exact) == []


def test_other_keys_and_counts_are_reported() -> None:
    stored, exact = read(CURVES / "1-rank.json")["igpt next_color"], read(EXACT)["next_color"]
    shorter = {**stored, "loss": stored["loss"][:-1]}
    assert changes(shorter, stored) == ["loss has 19 values, stored 20"]
    assert changes(stored, shorter) == ["loss has 20 values, stored 19"]
    without = {key: values for key, values in stored.items() if key != "valid_loss"}
    assert changes(without, stored) == ["valid_loss has 0 values, stored 2"]
    assert exact_changes({**exact, "step": exact["step"][:-1]}, exact) == ["step has 19 values, stored 20"]
    assert exact_changes({**exact, "epoch": [1]}, exact) == ["epoch has 1 values, stored 0"]


def test_a_step_without_recorded_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    row = {"step": 1, "loss": 6.2, "applied": True, "images": 8, "learning_rate": 0.003}
    (tmp_path / "run/metrics.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(AssertionError, match="step 1: no recorded images"):
        exact_of(Runner(SHARDS, tmp_path), "run")
