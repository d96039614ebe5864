"""Stored runs, of this version and earlier ones: they resume on any layout and export.

The newest has the format of today's checkpoints.
"""

from pathlib import Path

import pytest

from data_prep.shards.reader import open_shard_set
from tests.golden.curves import SHARDS, changes, curve_of, exact_changes, exact_of, read
from tests.golden.stored_runs import (
    EXPECTED,
    LAST,
    LAYOUTS,
    LOGITS_TOLERANCE,
    RUNS,
    SAVED,
    WEIGHTS,
    format_of,
    keys_of,
    logits_of,
    names,
    resume,
)
from tests.golden.test_curves import ADVICE

NEWEST = names()[-1]


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.slow] * (name != "1-rank")) for name in LAYOUTS]
)
@pytest.mark.parametrize("name", names())
def test_it_resumes_with_the_stored_curve(name: str, layout: str, tmp_path: Path) -> None:
    """The load verifies its checksums. The newest has the format of the checkpoints that are written today."""
    stored = RUNS / name
    runner, expected = resume(stored, layout, tmp_path), read(stored / EXPECTED)
    sentences = changes(curve_of(runner, "run", after=SAVED), expected["curve"], SAVED + 1)
    sentences += exact_changes(exact_of(runner, "run", after=SAVED), expected["exact"])
    assert not sentences, "\n".join([*sentences, ADVICE])
    before, after = (folder / "run/checkpoints" for folder in (stored, tmp_path))
    if name == NEWEST:
        assert format_of(after / f"step-{LAST:08d}") == format_of(before / f"step-{SAVED:08d}"), ADVICE
    old, new = keys_of(stored / "run"), keys_of(tmp_path / "run", resumed=stored / "run")
    assert {file: keys - new[file] for file, keys in old.items() if keys - new[file]} == {}, "renamed or dropped keys"


@pytest.mark.parametrize("name", names())
def test_it_exports_to_the_stored_logits(name: str, tmp_path: Path) -> None:
    expected = read(RUNS / name / EXPECTED)["logits"]
    for kind in WEIGHTS:
        logits = logits_of(RUNS / name, kind, tmp_path / kind).flatten().tolist()
        assert logits == pytest.approx(expected[kind], abs=LOGITS_TOLERANCE, rel=0), f"{kind}: {ADVICE}"
    assert max(abs(a - b) for a, b in zip(expected["raw"], expected["ema"], strict=True)) > 100 * LOGITS_TOLERANCE


def test_the_stored_shard_set_is_read() -> None:
    """Its digests too: a file that git or an editor changed would be found here."""
    shards = open_shard_set(SHARDS)
    shards.verify()
    assert {name: shards.split(name).images for name in shards.splits} == {"train": 80, "valid": 20, "test": 10}
    assert shards.manifest["version"] == 2
