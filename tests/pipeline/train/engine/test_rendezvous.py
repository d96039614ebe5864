"""How ranks wait for each other: what they log, that signals end them, and the sentence of each failure."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipeline.distributed import Ranks
from pipeline.rank_errors import RankUnreachable
from pipeline.train.engine import rendezvous
from pipeline.train.engine.rendezvous import has_ended, this_process, wait_for_ranks
from tests.launch import SECONDS, finish, free_port, start

ALONE = """
from pipeline.train.engine import rendezvous
import runpy
rendezvous.FIRST_MESSAGE_SECONDS = 0.1
runpy.run_module("pipeline", run_name="__main__", alter_sys=True)
"""

UNANSWERED = """
import atexit, runpy
from datetime import timedelta
from pipeline.train.engine import rendezvous
rendezvous.wait_for_ranks.__defaults__ = (timedelta(seconds=0.3),)
atexit.register(print, "shut down")
runpy.run_module("pipeline", run_name="__main__", alter_sys=True)
"""


def rank_of(rank: int, count: int) -> Ranks:
    return Ranks(rank, count, 0, torch.device("cpu"))


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Listens on MASTER_PORT of this machine, and never answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        yield taken


def training(shards: Path, folder: Path) -> list[str]:
    """The arguments of a small run."""
    model = ["--model.layers=1", "--model.width=32", "--model.heads=2", "--model.resolution=8"]
    batch = ["--batch.global_size=2", "--batch.micro_size=1"]
    return ["train", f"--run={folder / 'run'}", f"--data.shards={shards}", *model, *batch]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_rank_that_waits_logs_and_ends_at_a_signal(
    number: signal.Signals, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    processes = start(1, "-c", ALONE, *training(shards, tmp_path), logs=tmp_path)
    log = tmp_path / "rank-0.log"
    message = f"waiting for 1 of 2 ranks (1) at 127.0.0.1:{port}, up to 10 minutes; WORLD_SIZE is 2: unset it to train"
    end = time.monotonic() + SECONDS
    while message not in log.read_text():
        assert processes[0].poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.05)
    processes[0].send_signal(number)
    assert finish(processes, tmp_path).codes == [-number]
    assert not (tmp_path / "run").exists()


def test_one_rank_alone_needs_no_address(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")
    assert wait_for_ranks(rank_of(0, 1)).processes == [this_process()]


def test_a_port_that_is_taken_is_named(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    with pytest.raises(
        RankUnreachable, match=rf"MASTER_PORT is {port}, .*\(Address already in use\); set it to a free"
    ):
        wait_for_ranks(rank_of(0, 2))


@pytest.mark.parametrize("case", ["Connection refused", "Name or service not known", "wrong answer"])
def test_a_rank_0_that_does_not_answer_is_named(
    case: str, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, case)

    def wrong(*_: object, **__: object) -> None:
        raise RuntimeError(case)

    if case == "Connection refused":
        listener.close()
    elif case == "Name or service not known":
        monkeypatch.setattr(socket, "create_connection", unknown)
    elif case == "wrong answer":  # torch raises RuntimeError
        monkeypatch.setattr(dist, "TCPStore", wrong)
    address = f"127.0.0.1:{os.environ['MASTER_PORT']}"
    with pytest.raises(RankUnreachable, match=rf"waited 0 minutes for rank 0 at {address} \({case}\); WORLD_SIZE is 2"):
        wait_for_ranks(rank_of(1, 2), timedelta(seconds=0.3))


def test_a_rank_0_that_never_answers_is_named_and_the_rank_skips_the_shutdown(
    listener: socket.socket, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shutdown would abort if the connecting thread returned from torch during it."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    finished = finish(start(1, "-c", UNANSWERED, *training(shards, tmp_path), logs=tmp_path, fresh=True), tmp_path)
    assert finished.codes == [1]
    address = f"127.0.0.1:{os.environ['MASTER_PORT']}"
    assert f"waited 0 minutes for rank 0 at {address} (no answer); WORLD_SIZE is 2" in finished.output
    assert "shut down" not in finished.output


def test_a_rank_0_that_ends_meanwhile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    port, raised = free_port(), []
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)

    def wait() -> None:
        try:
            wait_for_ranks(rank_of(1, 2))
        except RankUnreachable as error:
            raised.append(str(error))

    waiting = threading.Thread(target=wait)
    waiting.start()
    while not store.check([f"start 0/{rendezvous.PRESENT} 1"]):
        time.sleep(0.01)
    del store
    waiting.join()
    [sentence] = raised
    assert sentence.startswith("rank 0, or torchrun, ended before all 2 ranks were there (at 127.0.0.1:")


def test_a_restart_does_not_read_what_the_ranks_before_it_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun keeps its store; with the addresses of ranks that ended, gloo fails to connect."""
    port = free_port()
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}.items():
        monkeypatch.setenv(name, str(value))
    for attempt in range(2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        other = threading.Thread(target=wait_for_ranks, args=(rank_of(1, 2),))
        other.start()
        found = wait_for_ranks(rank_of(0, 2)).store
        other.join()
        assert not found.check(["address of rank 1"])
        found.set("address of rank 1", "")
    assert store.check(["start 0/address of rank 1", "start 1/address of rank 1"])


def test_processes_of_other_machines_are_not_checked() -> None:
    number, *_ = this_process().split()
    assert not has_ended(this_process())
    assert not has_ended(f"4194305 elsewhere {this_process().split()[2]}")
    assert has_ended(this_process().replace(number, "4194305", 1))
