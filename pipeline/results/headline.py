"""Headlines: the numbers of a task that a reader looks for."""

from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

from pipeline.results.published import FINE_TUNING, LOW_DATA, PROBE
from pipeline.results.report.html import number, percent, words

CHOSEN = {"best_layer": "layer", "best_k": "k", "learning_rate": "rate", "best_rate": "rate", "best_epoch": "epoch"}


NAMES = {"distill": "Distillation", "fine_tune": "Fine-tuning", "knn": "k-NN", "low_data": "Few labels"}


MEASURES = {"linear_probe": PROBE, "fine_tune": FINE_TUNING, "low_data": LOW_DATA}


class Headline(NamedTuple):
    """One number of a task that a reader looks for."""

    measure: str
    """As published.py calls it, or the task's name where nothing was published."""
    name: str
    """What was measured; the same words for every model."""
    text: str
    """The number, with its unit and error."""
    detail: str = ""
    """How it came about: the layer chosen, for one."""


def name_of(task: str) -> str:
    """linear_probe as "Linear probe"."""
    return NAMES.get(task, words(task).capitalize())


def headlines(task: str, result: dict[str, Any]) -> list[Headline]:
    """The task's own, or each test accuracy in its JSON: the task's, of objects within, and of objects in lists."""
    own = getattr(_module(task), "headlines", None)
    if own is not None:
        return own(result)
    measure, name = MEASURES.get(task, task), name_of(task)
    rows = _accuracies(measure, name, result)
    for key, value in result.items():
        if isinstance(value, dict):
            rows += _accuracies(measure, f"{name}: {words(key)}", value)
        elif _is_table(value):
            rows += [row for part in value for row in _accuracies(measure, f"{name}: {part.get('name', key)}", part)]
    return rows


def _accuracies(measure: str, name: str, result: dict[str, Any]) -> list[Headline]:
    """The test accuracy of an object that has one, of a masked model that of the vote over masks too."""
    rows = []
    for key, suffix in (("test_accuracy", ""), ("ensembled_test_accuracy", ", vote over masks")):
        if isinstance(result.get(key), float):
            error = result.get("test_accuracy_deviation", result.get("test_standard_error"))
            text = percent(result[key], error if key == "test_accuracy" else None)
            rows.append(Headline(measure, name + suffix, text, _chosen(result)))
    return rows


def _chosen(result: dict[str, Any]) -> str:
    """What was chosen on the validation split."""
    parts = [
        f"{name} {number(result[key])}" for key, name in CHOSEN.items() if isinstance(result.get(key), (int, float))
    ]
    if "best_layer" not in result and isinstance(result.get("layers"), list):
        parts.append(f"layers {', '.join(map(str, result['layers']))}")
    return ", ".join(parts)


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _module(task: str) -> ModuleType | None:
    from pipeline.evaluate.registry import TASKS

    return import_module(TASKS[task]) if task in TASKS else None
