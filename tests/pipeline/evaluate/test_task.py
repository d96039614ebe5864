"""A new task: what its class must define, and how its result is written."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import new_class
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from pipeline.evaluate.command import evaluate
from pipeline.evaluate.registry import TASKS, Entry
from pipeline.evaluate.task import LabelledTask, Task
from tests.pipeline.evaluate.tiny_sets import write_model


@dataclass(frozen=True, kw_only=True)
class Options:
    """None."""


class Odd(Task[Options]):
    """A task whose result a test sets."""

    title = "Odd"
    result: dict[str, Any]

    def measure(self, evaluation: object) -> dict[str, Any]:
        return self.result

    @classmethod
    def summary(cls, result: dict[str, Any]) -> str:
        return f"{result['test_accuracy']:.1%}"


@pytest.fixture
def measure(
    shards_folder: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Measures `odd`, or another task; returns the folder of results."""
    monkeypatch.setitem(TASKS, "odd", Entry(f"{__name__}:Odd"))

    def command(result: dict[str, Any] | None = None, model: Path = model_folder, task: str = "odd") -> Path:
        monkeypatch.setattr(Odd, "result", result, raising=False)
        out = tmp_path / "results"
        assert evaluate([str(model), "--shards", str(shards_folder), "--out", str(out), "--tasks", task]) == 0
        return out

    return command


def strict(path: Path) -> Any:
    """As a program reads it that knows no NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{path} has {name}")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_numbers_of_numpy_and_nan(measure: Callable[..., Path]) -> None:
    result = {"test_accuracy": np.float32(0.5), "count": np.int64(3), "yes": np.bool_(True), "list": np.arange(2)}
    lost = {"loss": np.float32("nan"), "rows": [{"name": "few", "test_accuracy": float("nan"), "worst": -np.inf}]}
    out = measure(result | lost)
    found = strict(out / "odd.json")
    assert {key: found[key] for key in result} == {"test_accuracy": 0.5, "count": 3, "yes": True, "list": [0, 1]}
    assert {key: found[key] for key in lost} == {
        "loss": None,
        "rows": [{"name": "few", "test_accuracy": None, "worst": None}],
    }
    assert [(row["name"], row["value"]) for row in found["headlines"]] == [("Odd", 0.5), ("Odd: few", None)]
    assert strict(out / "results.json")["tasks"]["odd"] == found
    assert '<td>Odd: few</td><td></td><td class="number">–</td>' in (out / "report.html").read_text().replace("\n", "")


@pytest.mark.parametrize("weight", [float("nan"), 3e38])
@pytest.mark.parametrize("task", ["density", "knn"])
def test_a_model_that_computes_nan_is_refused(
    weight: float, task: str, measure: Callable[..., Path], tmp_path: Path
) -> None:
    """A NaN weight, or finite ones whose activations overflow: no number is written."""
    model = write_model(tmp_path / "lost", "igpt")
    weights = load_file(model / "model.safetensors")
    weights["transformer.ln_f.weight"][:] = weight
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="NaN or Inf"):
        measure(model=model, task=task)
    assert not (tmp_path / "results" / f"{task}.json").exists()


def test_a_figure_that_fails_costs_no_number(
    measure: Callable[..., Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.evaluate.tasks.density.new_figure", lambda *_: 1 / 0)
    out = measure(task="density")
    assert strict(out / "density.json")["nats_per_color"] > 0
    assert "density.png can't be drawn; the numbers are complete" in caplog.text
    assert "<h2>Density</h2>" in (out / "report.html").read_text()


def test_a_section_that_fails_is_shown_in_the_general_form(
    measure: Callable[..., Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(result: dict[str, Any], folder: Path) -> str:
        raise KeyError("of another version")

    monkeypatch.setattr(Odd, "section", fails)
    page = (measure({"test_accuracy": 0.5, "depth": 7}) / "report.html").read_text()
    assert "<td>depth</td>" in page
    assert "the section of odd in report.html can't be written as usual" in caplog.text


def test_a_report_that_fails_costs_no_measurement(
    measure: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tasks that follow are measured; the command fails at its end."""

    def fails(*_arguments: object, **_options: object) -> Path:
        raise KeyError("a bug")

    monkeypatch.setattr("pipeline.evaluate.run.write_report", fails)
    with pytest.raises(OSError, match=r"report\.html could not be written \('a bug'\); all results are in their JSON"):
        measure({"test_accuracy": 0.5}, task="odd,density")
    assert all((tmp_path / "results" / f"{task}.json").is_file() for task in ("odd", "density"))


def test_a_later_versions_result_is_not_replaced(measure: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    path = tmp_path / "results/odd.json"
    path.write_text('{"format": "image-gpt-result", "version": 2}')
    with pytest.raises(
        ValueError, match=r"odd\.json was written by a later version of this program \(version 2 of its"
    ):
        measure({"test_accuracy": 0.5})
    assert json.loads(path.read_text())["version"] == 2


def test_a_damaged_result_is_measured_again(measure: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    path = measure({"test_accuracy": 0.5}) / "odd.json"
    path.write_text(path.read_text()[:-100])
    found = strict(measure({"test_accuracy": 0.25}) / "odd.json")
    assert (found["test_accuracy"], found["version"]) == (0.25, 1)
    assert "odd.json is damaged; the task runs again" in caplog.text


@pytest.mark.parametrize("key", ["task", "seed", "options", "inputs_digest", "title"])
def test_a_reserved_key_in_a_result_is_an_error(key: str, measure: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=f"^odd has '{key}' in its result, a key that evaluate writes; rename it"):
        measure({"test_accuracy": 0.5, key: 1})


@pytest.mark.parametrize(
    ("base", "content", "message"),
    [
        (Task, {"title": "T"}, r"T must name the dataclass of its options: class T\(Task\[Options\]\)\."),
        (LabelledTask, {"title": "T"}, "T must name the dataclass of its options"),
        (Task[Options], {}, r'T must have a title for the report, such as title = "Few labels"\.'),
    ],
)
def test_an_incomplete_class_is_an_error(base: Any, content: dict[str, str], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        new_class("T", (base,), {}, lambda names: names.update(content))
