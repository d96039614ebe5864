"""Real runs on a shard set at an address: the curve, stops, kills, a bad network, and what else takes an address."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.http_server import Server, serve
from tests.launch import Finished, finish, run, start
from tests.pipeline.conftest import Runner
from tests.pipeline.train.test_resume import STOPPED, wait_for_step

OPTIONS = {"batch__micro_size": 2, "checkpoint__every_steps": 5}
STEPS = 40
"""Steps of 8 images each, out of 270: the second epoch starts at step 34."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IGPT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def server(shards: Path) -> Iterator[Server]:
    with serve(shards) as server:
        yield server


@pytest.fixture(scope="module")
def unbroken(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Runner, Finished]:
    """A run named "unbroken" on the address, from beginning to end on two ranks."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("unbroken")
        patch.setenv("IGPT_CACHE", str(folder / "cache"))
        runner = Runner(server.url, folder)
        finished = runner.train("unbroken", 2, **OPTIONS)
    assert finished.codes == [0, 0], "\n".join(finished.outputs)
    return runner, finished


def check_same_curve(runner: Runner, name: str, unbroken: tuple[Runner, Finished]) -> None:
    assert runner.losses(name) == unbroken[0].losses("unbroken")
    valid = [
        [row["valid_loss"] for row in one.rows(which) if "valid_loss" in row]
        for one, which in ((runner, name), (unbroken[0], "unbroken"))
    ]
    assert len(valid[0]) == STEPS // 20
    assert valid[0] == valid[1]


def test_a_run_says_at_the_start_what_streaming_guarantees_less(unbroken: tuple[Runner, Finished]) -> None:
    output = unbroken[1].output
    assert "train is streamed, with weaker guarantees" in output
    assert output.index("train is streamed") < output.index("step ")
    assert len(unbroken[0].losses("unbroken")) == STEPS


@pytest.mark.slow
def test_stopped_and_resumed_the_curve_is_bit_equal(
    server: Server, tmp_path: Path, unbroken: tuple[Runner, Finished]
) -> None:
    runner = Runner(server.url, tmp_path)
    processes = start(2, *runner.arguments("run", **OPTIONS), logs=tmp_path / "logs")
    wait_for_step(tmp_path / "run", 7)
    processes[1].send_signal(signal.SIGUSR1)
    stopped = finish(processes, tmp_path / "logs")
    assert stopped.codes == [STOPPED, STOPPED], "\n".join(stopped.outputs)
    assert 7 <= len(runner.losses("run")) < STEPS
    finished = runner.train("run", 2, **OPTIONS)
    assert finished.codes == [0, 0], "\n".join(finished.outputs)
    assert "resumed from" in finished.output
    check_same_curve(runner, "run", unbroken)


def test_killed_and_resumed_over_a_bad_network_the_curve_is_bit_equal(
    shards: Path, tmp_path: Path, unbroken: tuple[Runner, Finished]
) -> None:
    with serve(shards, drop=0.3, busy=0.1, short=0.1) as server:
        runner = Runner(server.url, tmp_path)
        processes = start(2, *runner.arguments("run", **OPTIONS), logs=tmp_path / "logs")
        wait_for_step(tmp_path / "run", 13)
        os.killpg(processes[0].pid, signal.SIGKILL)
        for process in processes:
            process.wait()
        finished = runner.train("run", 2, **OPTIONS)
        assert finished.codes == [0, 0], "\n".join(finished.outputs)
        assert server.dropped + server.busy + server.short > 0
    check_same_curve(runner, "run", unbroken)


def test_a_damaged_record_ends_all_ranks_with_its_name(shards: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in shards.iterdir():
        if file.is_file():
            (damaged / file.name).write_bytes(file.read_bytes())
    tar = bytearray((damaged / "train-000000.tar").read_bytes())
    tar[2000] ^= 1
    (damaged / "train-000000.tar").write_bytes(tar)
    with serve(damaged) as server:
        finished = Runner(server.url, tmp_path).train("run", 2, **OPTIONS)
    assert all(code not in (0, STOPPED) for code in finished.codes)
    errors = [line for output in finished.outputs for line in output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert f"{server.url}/train-000000.tar, record 0, is damaged" in errors[0]
    assert "Traceback" not in "".join(finished.outputs)


@pytest.mark.slow  # half a minute: it is retried with growing pauses
def test_a_server_that_is_gone_is_named(tmp_path: Path, shards: Path) -> None:
    with serve(shards) as server:
        address = server.url
    finished = Runner(address, tmp_path).train("run", 2, **OPTIONS)
    assert all(code == 2 for code in finished.codes)
    errors = [line for output in finished.outputs for line in output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert address in errors[0]
    assert "Traceback" not in "".join(finished.outputs)


def test_other_commands_take_an_address_too(shards: Path, server: Server, finished_run: Runner, tmp_path: Path) -> None:
    checkpoint = finished_run.folder / "reference"
    evaluated, shown = [], []
    for number, place in enumerate((str(shards), server.url)):
        verified = run(1, "-m", "data_prep", "verify", place, logs=tmp_path / "verify")
        assert verified.codes == [0]
        assert f"{place}: matches its manifest" in verified.output
        out = tmp_path / f"{number}.png"
        assert run(1, "-m", "data_prep", "show", place, "--out", out, logs=tmp_path / "show").codes == [0]
        shown.append(out.read_bytes())
        results = tmp_path / f"results-{number}"
        arguments = ["evaluate", checkpoint, "--shards", place, "--tasks", "density", "--out", results]
        finished = run(1, "-m", "pipeline", *arguments, "--test_images", 20, logs=tmp_path / "evaluate")
        assert finished.codes == [0], finished.output
        evaluated.append(json.loads((results / "density.json").read_text()))
    assert shown[0] == shown[1]
    assert place in evaluated[1]["command"]
    for result in evaluated:
        del result["command"], result["seconds"]
    assert evaluated[0] == evaluated[1]
