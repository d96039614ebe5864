"""The learning-rate sweep, with real runs."""

import json
import os
import shutil
import signal
import sys
import time
from typing import Any

import pytest

from pipeline.operate.rate_search import half_decades
from tests.launch import SECONDS, Finished, Process, finish, start
from tests.pipeline.conftest import Runner


def search(runner: Runner, *own: object, **overrides: Any) -> Finished:
    return finish(start_search(runner, *own, **overrides), runner.folder / "logs")


def start_search(runner: Runner, *own: object, **overrides: Any) -> list[Process]:
    settings = {"schedule__steps": 12, "validation__every_steps": 12, "checkpoint__every_steps": 6, **overrides}
    train = [
        word for word in runner.arguments("none", **settings)[4:] if not word.startswith("--optimizer.learning_rate")
    ]
    command = ["-m", "pipeline", "search", "--runs", runner.folder / "search", *own, *train]
    return start(1, *command, logs=runner.folder / "logs")


def test_learning_rates_fall_by_half_decades() -> None:
    assert half_decades(0.01, 1e-4) == [0.01, 0.003, 0.001, 0.0003, 0.0001]
    assert half_decades(0.3, 0.01) == [0.3, 0.09, 0.03, 0.009][:3]


def test_it_ends_when_the_loss_stops_falling_and_repeats_no_run(runner: Runner, forked_python: str) -> None:
    """From learning rates far too high, some of which may diverge, to one with a higher loss than the one before."""
    wild = {"optimizer__clip_norm": 0, "schedule__warmup_steps": 0, "schedule__decay": "constant"}
    own = ["--first", "3", "--last", "0.0001", "--launch", f"{forked_python} -m pipeline train"]
    finished = search(runner, *own, **wild)
    assert finished.codes == [0], finished.output
    found = json.loads((runner.folder / "search/search.json").read_text())
    losses = [row["valid_loss"] for row in found["tried"]]
    known = [loss for loss in losses if loss is not None]
    best = min(known)
    assert found["best_rate"] == found["tried"][losses.index(best)]["rate"]
    assert known[-1] >= known[-2] == best
    assert finished.output.splitlines()[-1] == f"--optimizer.learning_rate {found['best_rate']:g}"
    again = search(runner, *own, **wild)
    assert again.codes == [0]
    assert json.loads((runner.folder / "search/search.json").read_text()) == found
    assert again.output.count("resumed from") <= losses.count(None)


@pytest.mark.slow
def test_a_stopped_run_stops_the_search(runner: Runner) -> None:
    folder = runner.folder / "search" / "rate-0.01"
    runner.check_trains("search/rate-0.01", 1, schedule__steps=12, validation__every_steps=12)
    shutil.rmtree(folder / "checkpoints")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"status": "stopped", "step": 0, "checkpoint": 0}))
    (folder / "STOP").touch()
    os.utime(folder / "STOP", (4e9, 4e9))  # as if it were made while the run trains
    finished = search(runner, "--last", "0.003")
    assert finished.codes == [75]
    assert "rate-0.01 was stopped; the same command resumes it." in finished.output
    finished = search(runner, "--last", "0.01")
    assert finished.codes == [0], finished.output


RUN_THAT_SAVES = """
trap 'echo TERM >>{0}/signals; exit 75' TERM
trap 'echo INT >>{0}/signals' INT
touch {0}/started
while :; do sleep 0.05; done
"""


def test_a_search_that_is_interrupted_waits_for_its_run(runner: Runner) -> None:
    """torchrun repeats a Ctrl-C within milliseconds; the run gets one request, which it takes as its own."""
    script = runner.folder / "run.sh"
    script.write_text(RUN_THAT_SAVES.format(runner.folder))
    processes = start_search(runner, "--launch", f"sh {script}")
    end = time.monotonic() + SECONDS
    while not (runner.folder / "started").exists():
        assert processes[0].poll() is None and time.monotonic() < end
        time.sleep(0.02)
    for _ in range(2):
        processes[0].send_signal(signal.SIGINT)
        time.sleep(0.002)
    finished = finish(processes, runner.folder / "logs")
    assert finished.codes == [75], finished.output
    assert "rate-0.01 was stopped; the same command resumes it." in finished.output
    assert (runner.folder / "signals").read_text() == "TERM\n"


def test_runs_with_another_number_of_steps_are_not_resumed(runner: Runner) -> None:
    """Their learning rate has decayed already, so the final loss would be another one."""
    runner.check_trains("search/rate-0.01", 1, schedule__steps=12, validation__every_steps=12)
    finished = search(runner, "--last", "0.01", schedule__steps=24)
    assert finished.codes == [2]
    assert "was trained with schedule.steps 12, and now it is 24; name another folder" in finished.output


def test_the_options_are_appended_to_the_launch_command(runner: Runner) -> None:
    launch = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 2 -m -- pipeline train"
    finished = search(runner, "--launch", launch, "--last", "0.01", batch__micro_size=2)
    assert finished.codes == [0], finished.output
    assert "2 data-parallel ranks" in finished.output


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (["--first", "0.001", "--last", "0.01"], "--first is 0.001 and --last is 0.01; --first must be the larger"),
        (["--first", "high"], "--first is 'high'; it must be a number"),
        (["--optimizer.learning_rate", "1"], "--optimizer.learning_rate is given, but the sweep sets it"),
        (["--launch", "nosuchprogram"], "--launch starts with 'nosuchprogram'; it must be a program"),
        (["--checkpoint.folder", "/disk"], "checkpoint.folder is /disk, which can be of one run alone"),
        (["--modle.size", "s"], "modle.size is not a known key"),
        (["--launch", "false"], "rate-0.01 ended with code 1 before its last step"),
    ],
)
def test_invalid_options(runner: Runner, own: list[str], message: str) -> None:
    finished = search(runner, *own)
    assert finished.codes == [2]
    assert message in finished.output
