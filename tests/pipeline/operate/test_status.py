"""Status: a run's state, and what a job script does after its ranks ended."""

import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

import pytest

from pipeline.operate.status import describe, next_action, read_status, status_command
from tests.launch import run
from tests.pipeline.conftest import Runner


def ended(folder: Path, status: str, step: int, error: str | None = None) -> Path:
    record = {"status": status, "step": step, "starts": [{}]} | ({"error": error} if error else {})
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": step, "loss": 1.0, "images": step}) + "\n")
    return folder


@pytest.mark.parametrize(
    ("status", "error", "code", "action"),
    [
        ("finished", None, 0, "done"),
        ("finished", None, 137, "done"),  # a rank was killed after the run was recorded as finished
        ("stopped", None, 75, "requeue"),
        ("stopped", None, 137, "requeue"),  # srun killed the slower ranks, which had saved
        ("running", None, 137, "requeue"),
        ("failed", "TimeoutError: no progress", 1, "requeue"),
        ("failed", "RuntimeError: Connection reset by peer", 1, "requeue"),
        ("failed", "Diverged: step 9 is not finite", 1, "failed"),
        ("failed", "ValueError: data.shards", 2, "failed"),
        ("running", None, 2, "failed"),
    ],
)
def test_the_action_after_each_end(tmp_path: Path, status: str, error: str | None, code: int, action: str) -> None:
    assert next_action(ended(tmp_path, status, 7, error), code, 0, 100, 3)[0] == action


def test_failures_at_the_same_step_are_limited_and_progress_resets_the_count(tmp_path: Path) -> None:
    for step in (5, 5, 8, 8):
        assert next_action(ended(tmp_path, "running", step), 137, 0, 100, 3)[0] == "requeue"
    action, why = next_action(ended(tmp_path, "running", 8), 137, 0, 100, 3)
    assert (action, "3 times at step 8" in why) == ("failed", True)


@pytest.mark.parametrize(
    ("checkpoint", "died", "count"),
    [(100, [131, 117, 142], 3), (0, [131, 117, 142, 109, 128], 5), (0, [5, 5, 8, 8, 8], 5)],
    ids=["after a checkpoint", "before the first, at random", "before the first"],
)
def test_failures_without_a_new_checkpoint_are_limited(
    checkpoint: int, died: list[int], count: int, tmp_path: Path
) -> None:
    """Each start may get to another step: what counts is what is saved."""
    if checkpoint:
        (tmp_path / f"checkpoints/step-{checkpoint:08d}").mkdir(parents=True)
    actions = [next_action(ended(tmp_path, "running", step), 137, 0, 100, 3) for step in died]
    assert [action for action, _ in actions] == ["requeue"] * (count - 1) + ["failed"]
    where = f"after the checkpoint of step {checkpoint}" if checkpoint else f"at step {died[-1]}"
    assert actions[-1][1] == f"it failed 3 times {where}, which is MAX_FAILURES"


def test_a_new_checkpoint_between_failures_is_progress(tmp_path: Path) -> None:
    for number in range(1, 9):
        (tmp_path / f"checkpoints/step-{100 * number:08d}").mkdir(parents=True)
        assert next_action(ended(tmp_path, "running", 100 * number + 5), 137, 0, 100, 3)[0] == "requeue"


def test_a_truncated_line_of_a_failure_does_not_hide_the_others(tmp_path: Path) -> None:
    for torn in ("", '{"time": 1.0, "st'):
        with (tmp_path / "failures.jsonl").open("a") as file:
            file.write(torn)
        assert next_action(ended(tmp_path, "running", 5), 137, 0, 100, 3)[0] == "requeue"
    assert next_action(ended(tmp_path, "running", 5), 137, 0, 100, 3)[0] == "failed"


def test_failures_recorded_by_an_earlier_version_count(tmp_path: Path) -> None:
    (tmp_path / "accidents.jsonl").write_text('{"step": 5}\n{"step": 5}\n')
    assert next_action(ended(tmp_path, "running", 5), 137, 0, 100, 3)[0] == "failed"


@pytest.mark.parametrize("option", ["--max_failures", "--max_accidents"])
def test_the_limit_of_failures_has_an_earlier_name(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status_command([str(ended(tmp_path, "running", 5)), "--after", "137", option, "1"])
    assert capsys.readouterr().out == "failed\n"


BEFORE, AFTER = "2026-01-31T12:00:00Z", "2026-01-31T12:00:05Z"


@pytest.mark.parametrize("status", ["stopped", "failed", "finished"])
def test_an_older_status_is_not_that_of_ranks_that_never_opened_the_run(tmp_path: Path, status: str) -> None:
    ended(tmp_path, status, 7, "ValueError: of an earlier start")
    record = json.loads((tmp_path / "run.json").read_text()) | {"updated": BEFORE}
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert next_action(tmp_path, 138, 0, 100, 3, since=AFTER, asked=True)[0] == "requeue"
    assert not (tmp_path / "failures.jsonl").exists(), "a signal during imports is not a failure"
    actions = [next_action(tmp_path, 1, 0, 100, 3, since=AFTER)[0] for _ in range(3)]
    assert actions == ["requeue", "requeue", "failed"]
    assert next_action(tmp_path, 0, 0, 100, 3, since=AFTER)[0] == ("done" if status == "finished" else "failed")
    assert next_action(tmp_path, 1, 0, 100, 3, since=BEFORE)[0] == {"stopped": "requeue", "finished": "done"}.get(
        status, "failed"
    )


def test_restarts_are_limited(tmp_path: Path) -> None:
    assert next_action(ended(tmp_path, "stopped", 5), 75, 99, 100, 3)[0] == "requeue"
    assert next_action(ended(tmp_path, "stopped", 5), 75, 100, 100, 3)[0] == "failed"


def test_a_run_that_never_started_is_requeued(tmp_path: Path) -> None:
    assert next_action(tmp_path, 1, 0, 100, 3)[0] == "requeue"
    assert next_action(tmp_path, 2, 0, 100, 3)[0] == "failed"


def test_a_real_run_is_described(finished_run: Runner, tmp_path: Path) -> None:
    folder = finished_run.folder / "reference"
    now = read_status(folder)
    assert (now.status, now.step, now.steps, now.starts) == ("finished", 40, 40, 1)
    shown = run(1, "-m", "pipeline", "status", folder, logs=tmp_path / "logs")
    assert shown.codes == [0]
    assert "step      40 of 40 (100.0%)" in shown.output
    nothing = run(1, "-m", "pipeline", "status", tmp_path, logs=tmp_path / "logs")
    assert nothing.codes == [2]
    assert "has no run.json" in nothing.output


def test_a_step_that_was_not_finite_is_described(tmp_path: Path) -> None:
    """Its loss is null in metrics.jsonl."""
    row = {"step": 7, "images": 56, "loss": None, "grad_norm": None, "images_per_second": 3.5}
    (ended(tmp_path, "running", 7) / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert "loss      NaN or Inf, 3.5 images/s" in describe(read_status(tmp_path))


def running(folder: Path, holder: str | None = "process 1 on node1", steps: int = 100) -> TextIO:
    """A run at step 40 of 20 images/s, whose batch was raised from 8 to 80 images at step 20. Returns its lock."""
    rows, images = [], 0
    for step in range(1, 41):
        size = 8 if step <= 20 else 80
        images += size
        rows.append({"step": step, "images": images, "loss": 5.123456789, "applied": True, "images_per_second": 20.0})
    rows.insert(20, {"step": 20, "images": 160, "valid_loss": 5.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.json").write_text(json.dumps({"status": "running", "starts": [{}]}))
    (folder / "config.yaml").write_text(f"schedule: {{steps: {steps}}}\nbatch: {{global_size: 80, micro_size: 4}}\n")
    for step in (20, 30):
        (folder / f"checkpoints/step-{step:08d}").mkdir(parents=True, exist_ok=True)
    lock = (folder / ".lock").open("w")
    if holder is not None:
        lock.write(holder)
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def test_a_running_run_is_described_with_what_is_left_at_the_present_batch(tmp_path: Path) -> None:
    with running(tmp_path):
        shown = describe(read_status(tmp_path)).splitlines()
    assert [line for line in shown if "written" not in line] == [
        "running",
        "  step      40 of 100 (40.0%); started once",
        "  loss      5.1235 nats per token, 20.0 images/s",
        "  valid     5.5000 nats per token at step 20",
        "  left      0.067 hours at this throughput",  # 60 steps of 80 images at 20 images/s are 240 s
        "  saved     steps 20, 30",
        "  lock      held by process 1 on node1",
    ]


def test_a_killed_run_is_not_called_running(tmp_path: Path) -> None:
    killed = subprocess.Popen([sys.executable, "-S", "-c", ""])
    killed.wait()
    running(tmp_path, holder=None).close()
    (tmp_path / ".lock").write_text(f"process {killed.pid} on {platform.node()}")
    shown = describe(read_status(tmp_path))
    assert shown.startswith(
        "not running: it was killed, or its machine failed; the same command (without --resume_from) resumes it from "
        "the checkpoint of step 30\n"
    )
    assert "left" not in shown
    assert "  lock      not held" in shown


def test_a_run_of_another_machine_whose_lock_is_not_seen_runs_while_it_writes(tmp_path: Path) -> None:
    """Its locks may be local to its node."""
    running(tmp_path, holder=None).close()
    (tmp_path / ".lock").write_text("process 1 on node1, SLURM job 7")
    for silence, shown in ((600, "running, but this machine sees no lock; the last write was 10 minutes ago\n"),
                           (2000, "not running: it was killed")):  # fmt: skip
        for name in ("metrics.jsonl", "run.json"):
            os.utime(tmp_path / name, (time.time() - silence,) * 2)
        assert describe(read_status(tmp_path)).startswith(shown)
    with (tmp_path / "config.yaml").open("a") as file:
        file.write("health: {hang_minutes: 60}\n")
    assert describe(read_status(tmp_path)).startswith("running, but")


@pytest.mark.parametrize("status", ["failed", "stopped", "finished"])
def test_nothing_is_left_of_a_run_that_does_not_run(status: str, tmp_path: Path) -> None:
    running(tmp_path, holder=None).close()
    (tmp_path / "run.json").write_text(json.dumps({"status": status, "starts": [{}]}))
    assert "left" not in describe(read_status(tmp_path))


def test_a_run_beyond_its_steps_has_no_share(tmp_path: Path) -> None:
    running(tmp_path, steps=20).close()
    shown = describe(read_status(tmp_path))
    assert "step      40 of 20; started" in shown
    assert "%" not in shown


def test_the_speed_is_an_average(tmp_path: Path) -> None:
    """Of 8 images in 1 s and 8 images in 3 s."""
    rows = [{"step": n, "images": 8 * n, "loss": 1.0, "images_per_second": 8 / s} for n, s in ((1, 9), (2, 1), (3, 3))]
    (ended(tmp_path, "stopped", 3) / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "1.0000 nats per token, 4.0 images/s" in describe(read_status(tmp_path))


def test_a_lock_that_cannot_be_tested_leaves_the_recorded_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running(tmp_path, holder=None).close()

    def flock(*arguments: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    shown = describe(read_status(tmp_path))
    assert shown.startswith("running\n")
    assert "lock      unknown: the lock can't be tested (Function not implemented)" in shown
