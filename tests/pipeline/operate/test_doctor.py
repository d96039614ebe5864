"""The doctor finds a sound machine sound, and says what is wrong with one that is not."""

import json
from math import inf
from pathlib import Path

import pytest

from pipeline.operate import doctor
from tests.launch import run


def test_a_sound_machine(tmp_path: Path) -> None:
    """The whole of it: a save, a kill, resumes on one rank and on two stages."""
    finished = run(1, "-m", "pipeline", "doctor", "--folder", tmp_path, logs=tmp_path / "logs")
    assert finished.codes == [0], finished.output
    assert "ok    packages" in finished.output
    assert "saved on 2 ranks, killed, resumed on 1 rank and on 2 stages, with the losses of an unbroken run" in (
        finished.output
    )
    assert finished.output.splitlines()[-1] == "sound."
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


def test_a_resume_that_trains_something_else_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The resumed run's losses are off by a little."""
    monkeypatch.setattr(doctor._Trial, "prepare", lambda self: None)
    monkeypatch.setattr(doctor._Trial, "finish", lambda self, run, ranks, stages=1: None)
    monkeypatch.setattr(doctor._Trial, "kill_after_a_save", lambda self, run: (self.folder / run).mkdir())
    off = {"unbroken": 0.0, "killed": 0.0, "staged": 1e-3}
    monkeypatch.setattr(doctor._Trial, "losses", lambda self, run: [3.0 + off[run]] * doctor.STEPS)
    finding = doctor.try_out(tmp_path)
    assert finding.verdict == "BAD"
    assert "0.001 away" in finding.words


def test_a_loss_that_was_not_finite_is_no_match(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": None}, {"step": 3, "loss": 2.25}]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses = doctor._Trial(tmp_path).losses("run")
    assert losses == [2.5, None, 2.25]
    assert doctor.largest_difference(losses, [2.5, 2.5, 2.0]) == inf
    assert doctor.largest_difference(losses[2:], [2.0]) == 0.25


def test_a_run_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "STEPS", 3)  # fewer than the warm-up: train refuses it
    *_, (what, last) = doctor.examine(tmp_path, trial=True)
    assert what == "trial"
    assert last.verdict == "BAD"
    assert "schedule.warmup_steps is 4; it must be below schedule.steps, 3" in last.words


def test_other_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "requirements.txt").write_text("torch==1.0.0\nnumpy>=1\nno-such-package==2.0\n")
    monkeypatch.setattr(doctor, "REQUIREMENTS", tmp_path / "requirements.txt")
    finding = doctor._packages()
    assert finding.verdict == "BAD"
    assert "not 1.0.0; no-such-package is missing, not 2.0: pip install" in finding.words


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    finished = run(1, "-m", "pipeline", "doctor", "--folder", tmp_path / "none", logs=tmp_path / "logs")
    assert finished.codes == [2]
    assert "which is no folder" in finished.output
