"""`python -m pipeline evaluate` asked to stop: one sentence, exit code 75, and what was done stays."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from data_prep.common.files import read_json
from pipeline.evaluate.interrupt import MESSAGE, until_stopped
from pipeline.stop_signals import STOP_SIGNALS
from tests import launch


def wait_until(there: Callable[[], bool], seconds: float = 240) -> None:
    last = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < last
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("ranks", "number"),
    [
        pytest.param(1, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGINT, marks=pytest.mark.slow),
        (2, signal.SIGTERM),
    ],
)
def test_a_command_that_is_asked_to_stop_logs_it_once(
    ranks: int, number: signal.Signals, shards_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    out, logs = tmp_path / "results", tmp_path / "logs"
    processes = launch.start(
        ranks, "-m", "pipeline", "evaluate", model_folder, "--shards", shards_folder, "--out", out, "--tasks",
        "density,low_data,knn", "--low_data.per_class", "[25]", "--low_data.subsets", "20000", logs=logs,
    )  # fmt: skip
    wait_until(lambda: bool(list(out.glob(".unfinished/low_data/*/*.npz"))))
    for process in processes:
        process.send_signal(number)
    finished = launch.finish(processes, logs)
    assert finished.codes == [75] * ranks, finished.outputs
    assert [output.count(MESSAGE) for output in finished.outputs] == [1, *[0] * (ranks - 1)]
    assert not any("Traceback" in output or "error:" in output for output in finished.outputs), finished.outputs
    assert not list(out.rglob("*.partial"))
    results = read_json(out / "results.json")
    assert (list(results["tasks"]), results["not_run"]) == (["density"], ["low_data", "knn"])


DEAF = """
import signal, threading
from contextlib import suppress
from pipeline.evaluate import interrupt

def deaf():
    threading.Timer(0.1, signal.raise_signal, [signal.SIGTERM]).start()
    while True:
        with suppress(interrupt.Stopped):
            threading.Event().wait()

interrupt.GRACE_SECONDS = 0.2
interrupt.until_stopped(deaf)
"""


def test_a_blocked_process_ends_too(tmp_path: Path) -> None:
    """As who waits in a collective for a rank that has left."""
    finished = launch.run(1, "-c", DEAF, logs=tmp_path, seconds=120)
    assert (finished.codes, finished.output) == ([75], f"{MESSAGE}\n")


@pytest.mark.filterwarnings("error")
def test_a_process_may_have_many_files_open() -> None:
    """The thread that watches for a blocked process must not end in an error."""
    with ExitStack() as stack:
        for _ in range(1100):
            stack.callback(os.close, os.dup(0))
        assert until_stopped(lambda: os.kill(os.getpid(), signal.SIGUSR1) or 0) == 75


class StopsWhenFreed:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGUSR1)


@pytest.mark.filterwarnings("error")
def test_a_request_that_comes_while_an_object_is_freed_is_not_lost(capsys: pytest.CaptureFixture[str]) -> None:
    """Python prints and drops an exception that is raised there."""

    def work() -> int:
        StopsWhenFreed()
        time.sleep(3)
        return 0

    assert until_stopped(work) == 75
    assert "Exception ignored" not in capsys.readouterr().err


def test_signals_are_as_before_afterwards() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    assert until_stopped(lambda: 3) == 3
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    assert until_stopped(lambda: os.kill(os.getpid(), signal.SIGUSR1) or 0) == 75


def test_a_closed_terminal_asks_to_stop_unless_it_is_ignored_as_by_nohup() -> None:
    assert until_stopped(lambda: os.kill(os.getpid(), signal.SIGHUP) or 3) == 75
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert until_stopped(lambda: os.kill(os.getpid(), signal.SIGHUP) or 3) == 3
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)
