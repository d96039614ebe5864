"""Headlines: the numbers of a task that a reader looks for, as the task's JSON holds them.

`python -m pipeline evaluate` writes `title`, `summary` and `headlines` into each task's JSON. Report, card and
comparison read them from there and know no task; what an earlier version did not write is in earlier.py.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal

from pipeline.results.text import MISSING, number, percent, words

CHOSEN = {"best_layer": "layer", "best_k": "k", "learning_rate": "rate", "best_rate": "rate", "best_epoch": "epoch"}
"""Keys of what was chosen on the validation split, and their words."""


@dataclass(frozen=True)
class Headline:
    """One number of a task that a reader looks for."""

    name: str
    """What was measured; the same words for every model."""
    value: float | None
    """None in a task's JSON where it is NaN or Inf."""
    unit: Literal["accuracy", "nats", "distance"]
    """accuracy: a fraction; nats: per color; distance: Fréchet's."""
    error: float | None = None
    """Standard error or deviation, in the same unit."""
    detail: str = ""
    """How it came about: the layer chosen, for one."""
    measure: str = ""
    """As published.py calls it; "" where nothing was published."""

    @property
    def text(self) -> str:
        """The number, with its unit and error."""
        if self.value is None:
            return MISSING
        if self.unit == "accuracy":
            return percent(self.value, self.error)
        return f"{self.value:.4f}" if self.unit == "nats" else f"{self.value:.3f}"

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Headline":
        """What `asdict` gave; keys of a later version are passed over."""
        return cls(**{field.name: content[field.name] for field in fields(cls) if field.name in content})


def headlines_of(result: dict[str, Any]) -> list[Headline]:
    """Those in a task's JSON."""
    return [Headline.from_json(content) for content in result["headlines"]]


def accuracy_headlines(result: dict[str, Any], title: str, measure: str = "") -> list[Headline]:
    """Each test accuracy in a task's JSON: the task's own, of objects within, and of objects in lists."""
    rows = _accuracies(result, title, measure)
    for key, value in result.items():
        if isinstance(value, dict):
            rows += _accuracies(value, f"{title}: {words(key)}", measure)
        elif is_table(value):
            rows += [row for part in value for row in _accuracies(part, f"{title}: {part.get('name', key)}", measure)]
    return rows


def _accuracies(result: dict[str, Any], name: str, measure: str) -> list[Headline]:
    """The test accuracy of an object that has one, of a masked model that of the vote over masks too."""
    error = result.get("test_accuracy_deviation", result.get("test_standard_error"))
    return [
        Headline(name + suffix, result[key], "accuracy", error if key == "test_accuracy" else None, _chosen(result),
                 measure)
        for key, suffix in (("test_accuracy", ""), ("ensembled_test_accuracy", ", vote over masks"))
        if isinstance(result.get(key), float)
    ]  # fmt: skip


def _chosen(result: dict[str, Any]) -> str:
    """What was chosen on the validation split."""
    parts = [
        f"{name} {number(result[key])}" for key, name in CHOSEN.items() if isinstance(result.get(key), (int, float))
    ]
    if "best_layer" not in result and isinstance(result.get("layers"), list):
        parts.append(f"layers {', '.join(map(str, result['layers']))}")
    return ", ".join(parts)


def is_table(value: Any) -> bool:
    """Whether a value of JSON is a list of objects."""
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)
