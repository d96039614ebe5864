"""Doctor: all checks pass on this machine, and each kind of failure is reported."""

import json
from math import inf
from pathlib import Path

import pytest

from pipeline.operate import doctor
from tests.launch import run


def test_all_checks_pass(tmp_path: Path) -> None:
    """With the trial run: a checkpoint, a kill, and resumes on one rank and on two stages."""
    finished = run(1, "-m", "pipeline", "doctor", "--folder", tmp_path, logs=tmp_path / "logs")
    assert finished.codes == [0], finished.output
    assert "ok    packages" in finished.output
    assert "saved on 2 ranks, killed, resumed on 1 rank and on 2 stages, with the losses of an uninterrupted run" in (
        finished.output
    )
    assert finished.output.splitlines()[-1] == "all checks passed."
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


def test_a_resumed_run_with_other_losses_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses after resuming differ a little."""
    monkeypatch.setattr(doctor._Trial, "prepare", lambda self: None)
    monkeypatch.setattr(doctor._Trial, "finish", lambda self, run, ranks, stages=1: None)
    monkeypatch.setattr(doctor._Trial, "kill_after_a_save", lambda self, run: (self.folder / run).mkdir())
    off = {"uninterrupted": 0.0, "killed": 0.0, "staged": 1e-3}
    monkeypatch.setattr(doctor._Trial, "losses", lambda self, run: [3.0 + off[run]] * doctor.STEPS)
    finding = doctor.try_out(tmp_path)
    assert finding.status == "FAIL"
    assert "differ by up to 0.001" in finding.text


def test_a_loss_of_nan_never_matches(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": None}, {"step": 3, "loss": 2.25}]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses = doctor._Trial(tmp_path).losses("run")
    assert losses == [2.5, None, 2.25]
    assert doctor.largest_difference(losses, [2.5, 2.5, 2.0]) == inf
    assert doctor.largest_difference(losses[2:], [2.0]) == 0.25


def test_the_message_of_a_failed_trial_run_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "STEPS", 3)  # fewer than the warm-up: train refuses it
    *_, (what, last) = doctor.examine(tmp_path, trial=True)
    assert what == "trial"
    assert last.status == "FAIL"
    assert "schedule.warmup_steps is 4; it must be below schedule.steps, 3" in last.text


def test_wrong_versions_and_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "requirements.txt").write_text("torch==1.0.0\nnumpy>=1\nno-such-package==2.0\n")
    monkeypatch.setattr(doctor, "REQUIREMENTS", tmp_path / "requirements.txt")
    finding = doctor._packages()
    assert finding.status == "FAIL"
    assert "not 1.0.0; no-such-package is missing, not 2.0: pip install" in finding.text


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    finished = run(1, "-m", "pipeline", "doctor", "--folder", tmp_path / "none", logs=tmp_path / "logs")
    assert finished.codes == [2]
    assert "which is not a folder" in finished.output
