"""Marks against the best peer, and the pages that `make bench` writes."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.benchmarks import growth, record
from tests.benchmarks.marks import Growth, Result, result
from tests.benchmarks.peers.measure import Measured, Script


def measured(name: str, error: str | None = None, **turns: list[float]) -> Measured:
    """As `compare` gives it."""
    return Measured(Script(name, ""), dict(turns), error)


def test_the_mark_is_against_the_best_peer_that_ran() -> None:
    """Medians; a peer that failed, or lacks the figure, is no rival; seconds count the other way."""
    ours, fast = measured("ours", rate=[9.0, 12.0, 30.0]), measured("fast", rate=[10.0])
    peers = [measured("slow", rate=[2.0]), fast, measured("broken", "no such module"), measured("other", loss=[99.0])]
    rates = result("steps", "images/s", [ours, *peers], mark=1.25, limit=24.0, limited_by="its products")
    assert (rates.peer, rates.times, rates.verdict, rates.share) == ("fast (broken failed)", 1.2, "missed", 0.5)
    assert rates.sentence() == (
        "steps: 12 images/s, 1.20 times as good as the best peer, fast (broken failed): 10; mark 1.25: missed; its "
        "products would allow 24, ours reach 50%."
    )
    assert rates.line() == (
        "| steps | images/s | 12 | fast (broken failed) | 10 | 1.20 | 1.25: missed | 24 (its products) | 50% |"
    )
    seconds = result("start", "s", [ours, *peers], "rate", mark=1, more_is_better=False, limit=6.0)
    assert (seconds.peer, seconds.times, seconds.verdict, seconds.share) == (
        "slow (broken failed)",
        1 / 6,
        "missed",
        0.5,
    )
    assert result("steps", "", [fast, ours], mark=0.5).verdict == "reached"
    exact, off = measured("exact", rate=[0.0]), measured("off", rate=[12.0])
    assert result("off by", "", [exact, off], mark=1, more_is_better=False).verdict == "reached"
    assert result("off by", "", [off, exact], mark=1, more_is_better=False).verdict == "missed"
    assert result("off by", "", [exact, exact], mark=1, more_is_better=False).times == 1


def test_what_has_no_figure_says_why() -> None:
    """Ours failed; no peer ran; no mark is set."""
    ours = measured("ours", rate=[3.0])
    failed = result("steps", "images/s", [measured("ours", "out | of memory"), ours], mark=1)
    assert failed.sentence() == "steps: ours fails: out | of memory."
    assert failed.line() == "| steps | images/s | fails: out / of memory | ours | 3 |  | 1: not measured |  |  |"
    alone = result("steps", "images/s", [ours, measured("peer", "no such module")], mark=None)
    assert alone.sentence() == "steps: 3 images/s, nothing to compare." and alone.verdict == ""
    assert result("steps", "", [ours, ours, measured("peer", "x")], mark=1).peer == "ours (peer failed)"


def test_a_part_writes_its_page_and_the_summary_collects_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the parts, whichever was measured last; a part that is measured again replaces itself."""
    monkeypatch.setenv("BENCH_OUT", str(tmp_path))

    def part(work: str) -> Iterator[str | Result | Growth]:
        yield "| a | table |"
        yield Result(work, "images/s", 3.0, "peer", 2.0, mark=1.0)
        yield Result(f"{work} again", "images/s", None, "", problem="broken")
        yield Growth("`status`", "10 steps", (1, 10), (0.5, 5.0), 1.0)

    shown: list[str] = []
    record.write_part("saves", part("a save"), shown.append)
    record.write_part("reading", part("old"), shown.append)
    record.write_part("reading", part("a batch"), shown.append)
    page = (tmp_path / "reading.md").read_text()
    assert "make bench PARTS=reading" in page and "cores" in page and "torch 2." in page and "lightly 1." in page
    assert "| a | table |\n\n- a batch: 3 images/s, 1.50 times" in page and "- a batch again: ours fails" in page
    summary = record.write_summary(["reading", "saves", "starts"])
    assert (tmp_path / "summary.md").read_text() == summary
    rows = [line.split(" | ")[0] for line in summary.splitlines() if line.startswith("| ")]
    assert rows == [
        *(
            "| work",
            "| a batch",
            "| a batch again",
            "| a save",
            "| a save again",
            "| work, in CPU-seconds",
            *["| `status`"] * 2,
        ),
        *("| part", "| reading", "| saves"),
    ]
    assert "| `status` | 10 steps | 1x 0.5, 10x 5 | 1.00 |" in summary
    assert json.loads((tmp_path / "saves.json").read_text())["results"][0]["mark"] == 1.0


def test_the_exponent_is_that_of_the_last_sizes() -> None:
    """Quadratic in the last factor of ten; constant from 4 to 8 ranks."""
    assert growth._growth("x", "", [1.0, 1.0, 100.0]).exponent == pytest.approx(2)
    assert growth._growth("x", "", [1.0, 2.0, 3.0, 3.0], growth.RANKS).exponent == pytest.approx(0)
