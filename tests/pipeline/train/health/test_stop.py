"""Requests of users: files, which one rank looks for once a second, and signals."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.stop_signals import STOP_SIGNALS
from pipeline.train.health import stop
from tests.launch import ROOT


class Watched:
    """A path that counts how often it is looked for."""

    looks = 0

    def stat(self) -> os.stat_result:
        self.looks += 1
        return Path(__file__).stat()


def test_a_file_is_looked_for_once_a_second_by_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(stop.time, "monotonic", lambda: now[0])
    path: object = Watched()
    first, other = stop.RequestFile(path, checks=True), stop.RequestFile(path, checks=False)  # type: ignore[arg-type]
    found = []
    for _ in range(10):
        found.append(first.found())
        assert not other.found()
        now[0] += 0.25
    assert path.looks == 3  # type: ignore[attr-defined]
    assert [number for number, there in enumerate(found) if there] == [0, 4, 8]


def test_a_file_of_before_the_start_is_named_and_ignored_until_it_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stop, "CHECK_SECONDS", 0)
    path = tmp_path / "STOP"
    path.touch()
    os.utime(path, (1e9, 1e9))
    file = stop.RequestFile(path, checks=True)
    file.ignore_older(2e9)
    assert f"{path} dates from 2001-09-09" in caplog.text
    assert "before this start, and is ignored; delete it, or touch it again to stop the run" in caplog.text
    assert not file.found()
    file.delete()
    assert path.exists(), "a run that was stopped by a signal leaves it"
    os.utime(path, (1.5e9, 1.5e9))
    assert file.found(), "whoever touches it again asks for it"
    file.delete()
    assert not path.exists()
    assert not file.found()


def test_a_request_that_cannot_be_deleted_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "STOP").mkdir()
    stop.RequestFile(tmp_path / "STOP", checks=True).delete()
    assert f"{tmp_path / 'STOP'} can't be deleted" in caplog.text


def test_the_rank_that_looks_deletes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "STOP"
    path.touch()
    stop.RequestFile(path, checks=False).delete()
    assert path.exists()
    stop.RequestFile(path, checks=True).delete()
    assert not path.exists()


@pytest.fixture
def own_signals() -> Iterator[None]:
    """Restores what a test changes."""
    former = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_asks_to_stop(number: signal.Signals, own_signals: None, tmp_path: Path) -> None:
    requests = stop.StopRequests(tmp_path)
    assert not requests.pending()
    signal.raise_signal(number)
    assert requests.pending()


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_that_the_parent_process_had_blocked_asks_to_stop(
    number: signal.Signals, own_signals: None, tmp_path: Path
) -> None:
    """A process inherits blocked signals, and every thread of a library that it starts does too."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    requests = stop.StopRequests(tmp_path)
    signal.raise_signal(number)
    assert requests.pending()


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_asks_to_stop_after_a_library_has_replaced_the_handlers(
    number: signal.Signals, own_signals: None, tmp_path: Path
) -> None:
    """As LLVM does when Triton compiles its first kernel. Python does not know of it."""
    requests = stop.StopRequests(tmp_path)
    handlers_of_libc = ctypes.CDLL(None).signal
    handlers_of_libc.argtypes, handlers_of_libc.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    handlers_of_libc(number, 1)  # SIG_IGN
    signal.raise_signal(number)
    assert not requests.pending(), "the signal is lost; from here on they arrive"
    signal.raise_signal(number)
    assert requests.pending()


def test_a_closed_terminal_is_ignored_under_nohup(own_signals: None, tmp_path: Path) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    requests = stop.StopRequests(tmp_path)
    for _ in range(2):  # pending() installs the handlers again
        signal.raise_signal(signal.SIGHUP)
        assert not requests.pending()


def test_a_ctrl_c_that_torchrun_repeats_does_not_interrupt_and_a_later_one_does(
    own_signals: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(stop.time, "monotonic", lambda: now[0])
    requests = stop.StopRequests(tmp_path)
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        signal.raise_signal(number)
        now[0] += 0.002
    assert requests.pending()
    now[0] += 2
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("status", "seconds", "restarts", "stays"),
    [("stopped", 60, "1", True), ("stopped", 60, "0", False), ("stopped", -60, "1", False), ("failed", 60, "1", False)],
    ids=["stopped", "first start", "stopped earlier", "failed"],
)
def test_torchrun_does_not_restart_a_run_that_stopped_on_request(
    status: str, seconds: float, restarts: str, stays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """seconds: after the launcher, which is the parent of a rank, has started."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    assert not stop.restarted_after_stop(tmp_path)
    updated = time.gmtime(psutil.Process(os.getppid()).create_time() + seconds)
    record = {"status": status, "updated": time.strftime("%Y-%m-%dT%H:%M:%SZ", updated)}
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert stop.restarted_after_stop(tmp_path) == stays


def test_a_damaged_record_is_left_to_the_checks_of_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    (tmp_path / "run.json").write_text("[]")
    assert not stop.restarted_after_stop(tmp_path)
    (tmp_path / "run.json").write_text('{"status": "stopped"}')
    assert not stop.restarted_after_stop(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json"):
        stop.restarted_after_stop(tmp_path)


def test_a_request_right_before_the_start_is_older_and_one_right_after_is_not(tmp_path: Path) -> None:
    """Of a child: its start is known to a hundredth of a second."""
    words = "from pipeline.train.health.stop import process_start; import sys; sys.stdout.write(str(process_start()))"
    before = time.time()
    started = float(subprocess.run([sys.executable, "-c", words], cwd=ROOT, check=True, capture_output=True).stdout)
    assert before - 0.02 < started < time.time()
