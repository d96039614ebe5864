"""The registry: options declared in options.py, and options declared by tasks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.evaluate.command import evaluate
from pipeline.evaluate.registry import TASKS, Entry, options_type, task_class
from pipeline.evaluate.task import Task
from tests.launch import ROOT

OWN_OPTIONS = '''
from dataclasses import dataclass
from pipeline.evaluate.task import Task

@dataclass(frozen=True, kw_only=True)
class Options:
    """Of its own."""

    size: int = 3
    """How large."""

class Own(Task[Options]):
    title = "Own task"

    def unfit(self, evaluation):
        return f"its size is {self.options.size}"

    def measure(self, evaluation):
        return {}

    @classmethod
    def summary(cls, result):
        return "nothing"
'''


@pytest.mark.parametrize("name", TASKS)
def test_the_registry_names_the_options_and_title_of_each_task(name: str) -> None:
    task = task_class(name)
    assert issubclass(task, Task) and task.title
    assert task.options_type is options_type(name)
    assert TASKS[name].options in (None, task.options_type)
    assert getattr(task.options_type, "TASK", name) == name


@pytest.fixture
def own_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that declares its options in its own file."""
    (tmp_path / "own_task.py").write_text(OWN_OPTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_task", raising=False)
    monkeypatch.setitem(TASKS, "own", Entry("own_task:Own"))


@pytest.mark.parametrize("by_file", [False, True])
def test_a_task_that_is_named_brings_its_own_options(
    by_file: bool, own_task: None, shards_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    arguments = [str(model_folder), "--shards", str(shards_folder), "--out", str(tmp_path / "results")]
    if by_file:
        (tmp_path / "evaluate.yaml").write_text("tasks: own\nown: {size: 7}\n")
        arguments += ["--config", str(tmp_path / "evaluate.yaml")]
    else:
        arguments += ["--tasks", "own", "--own.size", "7"]
    with pytest.raises(ValueError, match="--tasks has own: its size is 7"):
        evaluate(arguments)


def test_a_task_with_its_own_options_is_not_in_the_default(own_task: None, tmp_path: Path) -> None:
    """In a process whose registry has it from the start: it gets as far as what is checked after parsing."""
    registered = "from pipeline.evaluate.registry import TASKS, Entry; TASKS['own'] = Entry('own_task:Own'); "
    words = registered + "import sys; from pipeline.evaluate.command import evaluate; evaluate(sys.argv[1:])"
    arguments = ["model", "--shards", "shards", "--out", str(tmp_path / "own_task.py")]
    done = subprocess.run(
        [sys.executable, "-c", words, *arguments],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert "ValueError: --out is" in done.stderr, done.stderr


@pytest.mark.parametrize("option", ["own.size", "own"])
def test_an_option_of_a_task_that_is_not_named(option: str, own_task: None, tmp_path: Path) -> None:
    arguments = ["model", "--shards", "shards", "--out", "out", "--tasks", "density"]
    message = rf"^{option} is an option of the task own, which runs only if --tasks names it\.$"
    with pytest.raises(ValueError, match=message):
        evaluate([*arguments, f"--{option}=7"])
    config = tmp_path / "evaluate.yaml"
    config.write_text(yaml.safe_dump({option: 7}))
    with pytest.raises(ValueError, match=message):
        evaluate([*arguments, "--config", str(config)])
    config.write_text("knn: {k: [1]}\n")
    with pytest.raises(ValueError, match="shards"):  # of what comes after parsing
        evaluate([*arguments, "--config", str(config)])


def test_a_task_that_is_not_named_is_not_imported(own_task: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate(["--help"])
    assert "--own.size" not in capsys.readouterr().out and "own_task" not in sys.modules
    with pytest.raises(SystemExit):
        evaluate(["--tasks", "own", "--help"])
    assert "--own.size" in capsys.readouterr().out
