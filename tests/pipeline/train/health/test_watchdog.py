"""A process that is suspended and continued is no hang; one in which no Python thread runs is ended."""

import signal
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.checkpoint.run_folder import RunFolder
from pipeline.distributed import Ranks
from pipeline.train.health import watchdog
from pipeline.train.health.watchdog import Watchdog, group_timeout, start_timeout
from tests.launch import SECONDS, Process, finish, run, start

SUSPENDED = """
import sys, time
from pathlib import Path
import torch
from data_prep.common.logs import configure_logging
from pipeline.checkpoint.run_folder import RunFolder
from pipeline.distributed import Ranks
from pipeline.train.health import watchdog
configure_logging()
watchdog.OVERSLEPT_SECONDS, watchdog.GRACE_SECONDS = 1.0, 0.1
run = Path(sys.argv[1])
watched = watchdog.Watchdog(RunFolder(run), Ranks(0, 1, 0, torch.device("cpu")), minutes=0.05)
watched.enter("training", 1)
watched.enter("training", 2)
(run / "training").touch()
while not (run / "continued").exists():
    time.sleep(0.01)
time.sleep(1)
watched.enter("training", 3)
watched.end()
"""
LIMIT_SECONDS = 3.0
"""Of the 0.05 minutes; the guard's is 0.3 s longer."""


def await_file(path: Path, processes: list[Process]) -> None:
    end = time.monotonic() + SECONDS
    while not path.exists():
        assert processes[0].poll() is None and time.monotonic() < end
        time.sleep(0.02)


def test_time_in_which_a_run_is_suspended_is_no_hang(tmp_path: Path) -> None:
    """For longer than both limits: of the watchdog's thread, and of the process that guards it."""
    processes = start(1, "-c", SUSPENDED, tmp_path, logs=tmp_path)
    await_file(tmp_path / "training", processes)
    processes[0].send_signal(signal.SIGSTOP)
    time.sleep(2 * LIMIT_SECONDS)
    (tmp_path / "continued").touch()
    processes[0].send_signal(signal.SIGCONT)
    finished = finish(processes, tmp_path)
    assert finished.codes == [0], finished.output
    assert "this process did not run for " in finished.output
    assert "no progress" not in finished.output


def watchdog_of(run: Path, seconds: float) -> Watchdog:
    """Without its thread."""
    watched = Watchdog(RunFolder(run), Ranks(1, 2, 1, torch.device("cpu")), minutes=0)
    watched._seconds, watched._limit, watched._tick = seconds, seconds, 5.0
    return watched


def test_repeated_pauses_do_not_hide_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sleep of 5 s takes 25 s: only the 5 s count, so a limit of 30 s is over after the seventh."""
    watched, now = watchdog_of(tmp_path, 30.0), [0.0]
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: now[0]))
    watched._since = 0.0
    watched._guard = SimpleNamespace(beat=lambda: None)  # type: ignore[assignment]

    def wait(seconds: float) -> bool:
        now[0] += seconds + 20
        return now[0] > 1000

    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(watched._ended, "wait", wait)
    monkeypatch.setattr(watched, "_abort", lambda: None)
    monkeypatch.setattr(watchdog.os, "_exit", end)
    with pytest.raises(SystemExit):
        watched._watch()
    assert now[0] == 7 * 25


def test_the_first_step_has_more_time_also_if_the_loaded_step_is_validated_before(tmp_path: Path) -> None:
    watched, limits = watchdog_of(tmp_path, 60.0), []
    phases = [("validation", 20), ("reading", 21), ("training", 21), ("reading", 22), ("training", 22), ("saving", 22)]
    for phase, step in phases:
        watched.enter(phase, step)
        limits.append(watched._limit)
    assert limits == [180, 180, 180, 60, 60, 180]


def test_ranks_wait_for_days_only_while_a_watchdog_runs() -> None:
    assert start_timeout(20) == timedelta(minutes=65)
    assert group_timeout(20) == timedelta(days=14)
    assert start_timeout(0) == group_timeout(0) == timedelta(days=365)


STUCK = """
import ctypes, sys
from pipeline.train.health.gil_guard import GilGuard
guard = GilGuard(0.5)
def holds_the_lock():
    ctypes.PyDLL(None).sleep(1000)
holds_the_lock()
"""


def test_a_process_that_runs_no_python_writes_its_stack_and_ends(tmp_path: Path) -> None:
    finished = run(1, "-c", STUCK, logs=tmp_path)
    assert finished.codes == [-signal.SIGALRM]
    assert "holds_the_lock" in finished.output


def test_the_guard_ends_with_its_process(tmp_path: Path) -> None:
    script = "from pipeline.train.health.gil_guard import GilGuard; print(GilGuard(1000)._process.pid, flush=True)"
    finished = run(1, "-c", f"{script}; import os; os._exit(3)", logs=tmp_path)
    assert finished.codes == [3]
    guard = int(finished.output)
    end = time.monotonic() + SECONDS
    while guard_runs(guard):
        assert time.monotonic() < end
        time.sleep(0.05)


def guard_runs(number: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
