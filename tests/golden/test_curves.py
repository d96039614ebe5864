"""Losses, gradient norms, learning rates and images of short runs are as they were stored."""

from pathlib import Path

import pytest

from tests.golden.curves import (
    CURVES,
    EXACT,
    KINDS,
    LAYOUTS,
    changes,
    curve_of,
    exact_changes,
    exact_of,
    read,
    train_curves,
)
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
    assert changes({**stored, "loss": stored["loss"][:-1]}, stored)
    assert changes({key: values for key, values in stored.items() if key != "valid_loss"}, stored)
    exact = read(EXACT)["next_color"]
    for key, value in (("learning_rate", exact["learning_rate"][6] + 2e-12), ("tokens", "0" * 16), ("images", 57)):
        values = [value if step == 7 else each for step, each in enumerate(exact[key], start=1)]
        assert exact_changes(exact | {key: values}, exact) == [
            f"{key}: 1 of 20 steps differ, first {value}, stored {exact[key][6]}"
        ]
    assert exact_changes(exact, exact) == []
