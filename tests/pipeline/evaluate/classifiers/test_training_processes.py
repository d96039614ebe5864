"""The tasks that train, as real processes: one is killed and resumes, two ranks give the result of one."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from data_prep.shards.reader import ShardSet
from pipeline.evaluate.command import evaluate
from tests.launch import finish, run, start

QUICK = [
    "--batch_size", "15", "--fine_tune.epochs", "4", "--fine_tune.learning_rates", "[0.01, 0.003]",
    "--fine_tune.reflect_crop", "1", "--fine_tune.patience", "0", "--attentive_probe.epochs", "2",
    "--attentive_probe.layers", "[1, 2]", "--attentive_probe.learning_rates", "[0.02]", "--distill.epochs", "2",
    "--distill.learning_rates", "[0.02]",
]  # fmt: skip
TASKS = ("fine_tune", "attentive_probe", "distill")
SECONDS = 240


def command(model: Path, shards: ShardSet, out: Path, tasks: str) -> list[str]:
    return [str(model), "--shards", str(shards.path), "--out", str(out), "--tasks", tasks, *QUICK]


def result_of(folder: Path, task: str) -> dict:
    """Without what differs from one call to the next."""
    result = json.loads((folder / f"{task}.json").read_text())
    return {key: value for key, value in result.items() if key not in ("seconds", "command", "teacher_folder")}


def kill_when_said(words: str, ranks: int, arguments: list[str], logs: Path) -> None:
    """Starts the command and kills all ranks once the first has logged the words."""
    processes = start(ranks, "-m", "pipeline", "evaluate", *arguments, logs=logs)
    until = time.monotonic() + SECONDS
    while words not in (logs / "rank-0.log").read_text() and time.monotonic() < until:
        assert processes[0].poll() is None, (logs / "rank-0.log").read_text()
        time.sleep(0.01)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
    assert finish(processes, logs).codes == [-signal.SIGKILL] * ranks
    assert words in (logs / "rank-0.log").read_text()


def differences(one: object, other: object, name: str = "") -> list[str]:
    """Where two results are not equal; losses may differ by the rounding of sums."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted(one.keys() | other.keys())
        return [found for key in keys for found in differences(one.get(key), other.get(key), f"{name}.{key}")]
    if "loss" in name:
        other = pytest.approx(other, rel=1e-3)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [
            found
            for at, pair in enumerate(zip(one, other, strict=True))
            for found in differences(*pair, f"{name}.{at}")
        ]
    return [] if one == other else [f"{name}: {one} and {other}"]


@pytest.fixture(scope="module")
def alone(model_folder: Path, separable: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of one rank that nothing disturbed."""
    out = tmp_path_factory.mktemp("alone")
    assert evaluate(command(model_folder, separable, out, ",".join(TASKS))) == 0
    return out


def test_a_killed_process_goes_on_and_says_the_same(
    alone: Path, model_folder: Path, separable: ShardSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = command(model_folder, separable, tmp_path / "results", "fine_tune")
    kill_when_said("fine_tune-rate-0.003, epoch 1: loss", 1, arguments, tmp_path / "logs")
    assert not (tmp_path / "results" / "fine_tune.json").exists()
    caplog.clear()
    assert evaluate(arguments) == 0
    output = caplog.text
    assert "fine_tune-rate-0.003: resumes after epoch" in output
    assert "fine_tune-rate-0.01, epoch" not in output  # finished before
    assert "fine_tune-rate-0.003, epoch 1:" not in output
    found, expected = result_of(tmp_path / "results", "fine_tune"), result_of(alone, "fine_tune")
    assert found == expected, differences(found, expected)
    weights = [folder / "fine_tuned" / "model.safetensors" for folder in (alone, tmp_path / "results")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert [path.name for path in (tmp_path / "results/.unfinished").iterdir()] == [".fine_tune.lock"]


def test_two_ranks_say_what_one_says(alone: Path, model_folder: Path, separable: ShardSet, tmp_path: Path) -> None:
    arguments = command(model_folder, separable, tmp_path / "two", ",".join(TASKS))
    finished = run(2, "-m", "pipeline", "evaluate", *arguments, logs=tmp_path / "logs")
    assert finished.codes == [0, 0], "\n".join(finished.outputs)
    assert "2 ranks on cpu" in finished.output
    for task in TASKS:
        one, two = result_of(alone, task), result_of(tmp_path / "two", task)
        if task == "distill":  # its teacher's weights are rounded otherwise
            assert one.pop("teacher_digest") and two.pop("teacher_digest")
            assert one.pop("inputs_digest") and two.pop("inputs_digest")
        assert differences(one, two) == []


@pytest.mark.slow
def test_two_killed_ranks_go_on_with_the_same_bits(model_folder: Path, separable: ShardSet, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("uninterrupted", "killed")]
    uninterrupted, killed = (command(model_folder, separable, folder, "fine_tune,distill") for folder in folders)
    finished = run(2, "-m", "pipeline", "evaluate", *uninterrupted, logs=tmp_path / "logs-uninterrupted")
    assert finished.codes == [0, 0], "\n".join(finished.outputs)
    kill_when_said("fine_tune-rate-0.01, epoch 2: loss", 2, killed, tmp_path / "logs-killed")
    kill_when_said("distill-student-rate-0.02, epoch 1: loss", 2, killed, tmp_path / "logs-killed-again")
    finished = run(2, "-m", "pipeline", "evaluate", *killed, logs=tmp_path / "logs-finished")
    assert finished.codes == [0, 0], "\n".join(finished.outputs)
    assert "fine_tune: already measured with these inputs" in finished.output
    for task in ("fine_tune", "distill"):
        assert result_of(folders[1], task) == result_of(folders[0], task)
