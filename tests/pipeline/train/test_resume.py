"""A run that was killed, stopped or moved resumes with the same curve as an uninterrupted one."""

import json
import os
import random
import re
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.launch import SECONDS, Finished, finish, start
from tests.pipeline.conftest import Runner

SAME = {"batch__micro_size": 2}
STOPPED = 75


def train_through_kills(runner: Runner, name: str, kills: int, seed: int, **overrides: object) -> Finished:
    """Starts the run repeatedly and kills its process group at random moments, then lets it end.

    One kill in five comes while the ranks start; the others some steps on, at a random moment of a step or a save.
    """
    moments = random.Random(seed)
    logs = runner.folder / f"{name}.logs"
    target = 0
    for _ in range(kills):
        processes = start(2, *runner.arguments(name, **overrides), logs=logs)
        if moments.random() < 0.2:
            time.sleep(moments.uniform(0.2, 1.5))
        else:
            target = min(target + moments.randint(1, 5), 39)
            wait_for_step(runner.folder / name, target)
            time.sleep(moments.uniform(0, 0.05))
        with suppress(ProcessLookupError):  # it may have ended
            os.killpg(processes[0].pid, signal.SIGKILL)
        for process in processes:
            process.wait()
    return runner.train(name, 2, **overrides)


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_joined_curve_is_bit_equal(
    runner: Runner, finished_run: Runner, kills: int
) -> None:
    frequent = {**SAME, "checkpoint__every_steps": 3}
    finished = train_through_kills(runner, "run", kills, seed=kills, **frequent)
    assert finished.codes == [0, 0], "\n".join(finished.outputs)
    assert runner.losses("run") == finished_run.losses("reference")
    valid = [
        [row for row in r.rows(n) if "valid_loss" in row] for r, n in ((runner, "run"), (finished_run, "reference"))
    ]
    assert valid[0] == valid[1]


UNHURRIED = """
import runpy, time
from pipeline.train.loop import Trainer
read = Trainer.read_batch

def read_slowly(trainer, done):
    time.sleep(0.05)  # the STOP file is checked for once a second, which may be the whole run
    return read(trainer, done)

Trainer.read_batch = read_slowly
runpy.run_module("pipeline", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    "ask", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGTERM", "SIGHUP")), "SIGUSR1", "STOP file"]
)
def test_a_request_to_stop_saves_and_asks_for_a_requeue(runner: Runner, finished_run: Runner, ask: str) -> None:
    logs, path = runner.folder / "logs", runner.folder / "run"
    long = {**SAME, "checkpoint__every_steps": 1000}
    processes = start(2, "-c", UNHURRIED, *runner.arguments("run", **long)[2:], logs=logs)
    wait_for_step(path, 5)
    if ask == "STOP file":
        (path / "STOP").touch()
    else:
        processes[1].send_signal(getattr(signal, ask))
    stopped = finish(processes, logs)
    assert stopped.codes == [STOPPED, STOPPED], "\n".join(stopped.outputs)
    assert not (path / "STOP").exists()
    step = len(runner.losses("run"))
    assert 5 <= step < 40
    assert (path / "checkpoints" / f"step-{step:08d}" / "checkpoint.json").is_file()
    finished = runner.train("run", 2, **long)
    assert finished.codes == [0, 0], "\n".join(finished.outputs)
    assert runner.losses("run") == finished_run.losses("reference")


STOPPED_IN_EVALUATION = """
import os, runpy, signal
from pipeline.train import loop, validation
validation.CHUNK_MICRO_BATCHES = 1
check, calls = loop.Trainer.check_for_stop, 0

def check_and_ask(trainer):
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and calls == int(os.environ["AT_CHECK"]):
        os.kill(os.getpid(), signal.SIGTERM)
    check(trainer)

loop.Trainer.check_for_stop = check_and_ask
runpy.run_module("pipeline", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("at_check", "step", "validated"),
    [
        pytest.param(9 + 5, 40, [20], marks=pytest.mark.slow),
        pytest.param(5, 20, [], marks=pytest.mark.slow),
        pytest.param(9 + 9 + 2, 40, [20, 40], marks=pytest.mark.slow),
    ],
    ids=["validation of the last step", "validation", "samples"],
)
def test_a_request_to_stop_ends_validation_and_samples_and_the_next_start_repeats_them(
    at_check: int,
    step: int,
    validated: list[int],
    runner: Runner,
    finished_run: Runner,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The ranks check nine times in a validation, then four times while they draw samples at step 40."""
    settings = {**SAME, "checkpoint__every_steps": 1000, "samples__every_steps": 40, "samples__images": 2}
    logs = runner.folder / "logs"
    monkeypatch.setenv("AT_CHECK", str(at_check))
    stopped = finish(start(2, "-c", STOPPED_IN_EVALUATION, *runner.arguments("run", **settings)[2:], logs=logs), logs)
    assert stopped.codes == [STOPPED, STOPPED], "\n".join(stopped.outputs)
    assert f"a request to stop ended the evaluation of step {step}; the next start repeats it" in stopped.output
    last = stopped.output.splitlines()[-1]
    assert (
        f"stopped on request at step {step}: {runner.folder / 'run'}; step {step} is saved, the same command resumes"
        in last
    )
    assert len(runner.losses("run")) == step
    assert [row["step"] for row in runner.rows("run") if "valid_loss" in row] == validated
    assert not (runner.folder / "run/samples").exists()
    finished = runner.train("run", 2, **settings)
    assert finished.codes == [0, 0], "\n".join(finished.outputs)
    assert [row.get("valid_loss") for row in runner.rows("run")] == [
        row.get("valid_loss") for row in finished_run.rows("reference")
    ]
    assert runner.losses("run") == finished_run.losses("reference")
    assert (runner.folder / "run/samples/step-00000040.png").is_file()


def wait_for_step(run: Path, step: int) -> None:
    """Until metrics.jsonl has a row of that step."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        if (run / "metrics.jsonl").exists() and f'"step": {step},' in (run / "metrics.jsonl").read_text():
            return
        time.sleep(0.01)
    raise AssertionError(f"{run} made no step {step}")


@pytest.mark.parametrize(
    ("first", "second"),
    [((2, 1), (1, 0)), ((1, 0), (2, 3)), pytest.param((2, 3), (2, 2), marks=pytest.mark.slow)],
    ids=lambda pair: f"{pair[0]}x{pair[1]}",
)
def test_another_topology_resumes_with_the_same_curve(
    runner: Runner, finished_run: Runner, first: tuple[int, int], second: tuple[int, int]
) -> None:
    ranks, stage = first
    logs = runner.folder / "logs"
    processes = start(ranks, *runner.arguments("run", **SAME, parallel__zero_stage=stage), logs=logs)
    wait_for_step(runner.folder / "run", 12)
    processes[0].send_signal(signal.SIGTERM)
    assert finish(processes, logs).codes == [STOPPED] * ranks
    ranks, stage = second
    finished = runner.train("run", ranks, **SAME, parallel__zero_stage=stage)
    assert finished.codes == [0] * ranks, "\n".join(finished.outputs)
    assert "resumed from" in finished.output
    assert runner.losses("run") == pytest.approx(finished_run.losses("reference"), abs=2e-5)


def test_a_finished_run_is_left_alone(finished_run: Runner) -> None:
    before = (finished_run.folder / "reference/metrics.jsonl").read_bytes()
    finished = finished_run.train("reference", 1, batch__micro_size=2)
    assert finished.codes == [0]
    assert "nothing is left to train" in finished.output
    assert (finished_run.folder / "reference/metrics.jsonl").read_bytes() == before


def test_a_finished_run_logs_changes_without_effect(finished_run: Runner) -> None:
    finished = finished_run.train("reference", 1, batch__micro_size=2, schedule__steps=20)
    assert finished.codes == [0]
    assert "schedule.steps was 40 and is now 20, without effect on a finished run" in finished.output


@pytest.mark.parametrize(
    ("decay", "rise"),
    [("cosine", "the learning rate rises from 0 in step 10 to 0.000598 in step 11, as"), ("constant", None)],
)
def test_a_longer_run_warns_if_its_learning_rate_rises(runner: Runner, decay: str, rise: str | None) -> None:
    settings = {"schedule__decay": decay, "optimizer__learning_rate": 1e-3}
    runner.check_trains("run", 1, **settings, schedule__steps=10)
    finished = runner.train("run", 1, **settings, schedule__steps=20)
    assert finished.codes == [0]
    assert ("the learning rate rises" in finished.output) is (rise is not None)
    assert rise is None or rise in finished.output


def test_a_run_that_lost_its_checkpoints_does_not_start_from_scratch(runner: Runner) -> None:
    runner.check_trains("run", 1, schedule__steps=10)
    shutil.rmtree(runner.folder / "run/checkpoints")
    before = (runner.folder / "run/metrics.jsonl").read_bytes()
    for steps in (10, 20):
        finished = runner.train("run", 1, schedule__steps=steps)
        assert finished.codes == [2]
        assert "has trained 10 steps, but" in finished.output
    assert (runner.folder / "run/metrics.jsonl").read_bytes() == before


def test_an_earlier_checkpoint_is_resumed_and_the_later_ones_are_set_aside(
    runner: Runner, finished_run: Runner
) -> None:
    """From step 20 of a finished run; a file of the user's among the samples, and an old STOP file, do not matter."""
    run = runner.folder / "run"
    shutil.copytree(finished_run.folder / "reference", run)
    before = (run / "metrics.jsonl").read_bytes()
    (run / "samples").mkdir(exist_ok=True)
    (run / "samples/step-best.png").touch()
    (run / "STOP").touch()
    os.utime(run / "STOP", (1e9, 1e9))
    resumed = runner.train("run", 2, resume_from=20, checkpoint__keep_last=3, **SAME)
    assert resumed.codes == [0, 0], "\n".join(resumed.outputs)
    assert "step-00000020: step 20" in resumed.output
    assert f"the checkpoints after step 20 (30, 40) and the metrics were set aside in {run}/checkpoints/set-aside-" in (
        resumed.output
    )
    assert f"{run}/STOP dates from 2001-09-09" in resumed.output
    assert "the learning rate rises" not in resumed.output
    assert runner.losses("run") == finished_run.losses("reference")
    [aside] = (run / "checkpoints").glob("set-aside-*")
    assert sorted(path.name for path in aside.glob("step-*")) == ["step-00000030", "step-00000040"]
    assert (aside / "metrics.jsonl").read_bytes() == before
    for step in (30, 40):
        assert re.search(rf"saved {run}/checkpoints/step-{step:08d} in [\d.]+ s", resumed.output)
    assert (run / "samples/step-best.png").exists()
    assert json.loads((run / "run.json").read_text())["checkpoint"] == 40


def test_a_damaged_checkpoint_is_not_resumed_from_instead_of_the_newest(runner: Runner, finished_run: Runner) -> None:
    run = runner.folder / "run"
    shutil.copytree(finished_run.folder / "reference", run)
    with (run / "checkpoints/step-00000020/rank-00000.safetensors").open("r+b") as file:
        file.truncate(1000)
    refused = runner.train("run", 1, resume_from=20)
    assert refused.codes == [2]
    assert "--resume_from is 20, but this checkpoint is damaged:" in refused.output
    assert len(list((run / "checkpoints").glob("step-*"))) == 3


def test_tensorboard_shows_every_step_once(runner: Runner) -> None:
    logs = runner.folder / "logs"
    processes = start(1, *runner.arguments("run", samples__every_steps=20), logs=logs)
    wait_for_step(runner.folder / "run", 15)
    os.killpg(processes[0].pid, signal.SIGKILL)
    processes[0].wait()
    assert runner.train("run", samples__every_steps=20).codes == [0]
    events = EventAccumulator(str(runner.folder / "run/tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 41))
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(runner.losses("run"))
    assert [event.step for event in events.Images("completions")] == [20, 40]
    assert len(list((runner.folder / "run/samples").glob("*.png"))) == 2
