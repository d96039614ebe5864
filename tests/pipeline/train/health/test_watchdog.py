"""A process that is suspended and continued is no hang; one in which no Python thread runs is ended."""

import signal
import time
from pathlib import Path

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
    assert "this process was suspended for " in finished.output
    assert "no progress" not in finished.output


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
