"""Tasks that were killed, or run twice: what is finished is not done again, and the numbers are the same."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from shutil import copy
from typing import Any

import pytest

from data_prep.common.files import locked, read_json
from pipeline.evaluate.cache import TaskCache, clear_unfinished, lock_of
from pipeline.evaluate.options import LinearProbeOptions, SgdOptions
from pipeline.evaluate.registry import options_type, task_class
from tests import launch

SCRIPT = Path(__file__).with_name("killed_task.py")
SGD = LinearProbeOptions(solver="sgd", sgd=SgdOptions(rates=[0.1, 0.01], epochs=2, seeds=2))
TASK_OPTIONS = {
    "linear_probe": {"l2": [0.1, 0.01]},
    "knn": {},
    "low_data": {"per_class": [4], "fractions": [0.1], "subsets": 2, "l2": [0.1, 0.01]},
}


class Killed(BaseException):
    """Raised in place of a kill."""


@pytest.mark.parametrize("task", [*TASK_OPTIONS, "linear_probe by sgd"])
def test_a_killed_task_computes_the_rest_with_the_same_result(
    task: str, model_folder: Path, evaluation_of: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = task.split()[0]
    tested = task_class(name)(options_type(name)(**TASK_OPTIONS[task]) if task in TASK_OPTIONS else SGD)
    get_or_compute, done, ends = TaskCache.get_or_compute, [], [None]

    def counted(cache: TaskCache, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        def recorded() -> dict[str, Any]:
            value = work()
            done.append(name)
            return value

        value = get_or_compute(cache, name, recorded)
        if len(done) == ends[-1]:
            raise Killed
        return value

    monkeypatch.setattr(TaskCache, "get_or_compute", counted)
    evaluation = evaluation_of(model_folder)
    expected = tested.measure(evaluation)
    names = sorted(done)
    assert len(set(names)) == len(names) > 3
    clear_unfinished(evaluation.results, "test")
    done.clear()
    for count in (len(names) // 3, 2 * len(names) // 3, len(names)):  # the last one before the result is written
        ends.append(count)
        with pytest.raises(Killed):
            tested.measure(evaluation)
    ends.append(None)
    assert tested.measure(evaluation) == expected
    assert sorted(done) == names  # each once


@pytest.mark.slow
def test_killed_processes_resume_on_other_ranks(shards_folder: Path, model_folder: Path, tmp_path: Path) -> None:
    """SIGKILL on one rank, then on two; the third start finishes on two ranks what one rank finds undisturbed."""

    def command(out: str) -> list[object]:
        return [
            model_folder, "--shards", shards_folder, "--out", tmp_path / out, "--tasks", "linear_probe,knn,low_data",
            "--batch_size", "50", "--linear_probe.solver", "sgd", "--linear_probe.sgd.rates", "[0.1, 0.01]",
            "--linear_probe.sgd.epochs", "3", "--linear_probe.sgd.seeds", "2", "--low_data.per_class", "[4]",
            "--low_data.fractions", "[0.1]", "--low_data.subsets", "3", "--low_data.l2", "[0.1, 0.01]",
        ]  # fmt: skip

    def did(outputs: list[str]) -> list[str]:
        return re.findall(r"^did (.*)$", "\n".join(outputs), re.MULTILINE)

    uninterrupted = launch.run(1, SCRIPT, 0, *command("uninterrupted"), logs=tmp_path / "log-0")
    assert uninterrupted.codes == [0], uninterrupted.output
    names = sorted(did(uninterrupted.outputs))
    done = []
    for ranks, last in ((1, 9), (2, 12), (2, 0)):
        finished = launch.run(ranks, SCRIPT, last, *command("killed"), logs=tmp_path / f"log-{ranks}-{last}")
        assert (finished.codes == [0] * ranks) == (last == 0), finished.outputs
        done += did(finished.outputs)
    assert set(done) == set(names)
    assert len(done) <= len(names) + 1  # the rank that was not killed may lose the item it was computing
    for task in ("linear_probe", "knn", "low_data"):
        ours, theirs = (read_json(tmp_path / folder / f"{task}.json") for folder in ("killed", "uninterrupted"))
        for key in set(theirs) - {"command", "seconds"}:
            assert ours[key] == theirs[key], (task, key)


def test_a_second_command_waits_for_the_one_that_runs_the_same_task(
    shards_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    def arguments(out: str, task: str) -> list[object]:
        places = [model_folder, "--shards", shards_folder, "--out", tmp_path / out]
        return ["-m", "pipeline", "evaluate", *places, "--tasks", task]

    assert launch.run(1, *arguments("first", "knn"), logs=tmp_path / "log").codes == [0]
    with locked(lock_of(tmp_path / "results", "knn"), "the test"):
        assert launch.run(1, *arguments("results", "density"), logs=tmp_path / "log").codes == [0]
        [second] = launch.start(1, *arguments("results", "knn"), logs=tmp_path / "second")
        log, end = tmp_path / "second/rank-0.log", time.monotonic() + launch.SECONDS
        while f"waiting for another command that writes {tmp_path / 'results/knn.json'}" not in log.read_text():
            assert second.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        copy(tmp_path / "first/knn.json", tmp_path / "results")
    finished = launch.finish([second], tmp_path / "second")
    assert finished.codes == [0]
    assert "knn: already measured with these inputs, skipped" in finished.output
