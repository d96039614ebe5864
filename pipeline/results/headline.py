"""Headlines: the main numbers of a task, stored in the task's JSON.

`python -m pipeline evaluate` writes `title`, `summary` and `headlines` into each task's JSON. The report, the card and
the comparison read them from there and do not depend on the tasks. For results of earlier versions see earlier.py.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal

from pipeline.results.text import MISSING, number, percent, words

CHOSEN = {
    "best_layer": "layer",
    "best_k": "k",
    "learning_rate": "learning rate",
    "best_rate": "learning rate",
    "best_epoch": "epoch",
}
"""Keys of what was chosen on the validation split, with their names in the report."""
EARLIER_TEXTS = {
    "Nats per colour": "Nats per color",
    "Nats per hidden colour": "Nats per masked pixel",
    "Test loss, nats per colour": "Test loss, nats per color",
}
"""Names and measures in headlines of an earlier version, with the current ones."""


@dataclass(frozen=True)
class Headline:
    """One main number of a task."""

    name: str
    """What was measured; the same text for every model."""
    value: float | None
    """None if it is NaN or Inf."""
    unit: Literal["accuracy", "nats", "distance"]
    """accuracy: a fraction; nats: per color; distance: the Fréchet distance."""
    error: float | None = None
    """Standard error or deviation, in the same unit."""
    detail: str = ""
    """How it was obtained, such as the chosen layer."""
    measure: str = ""
    """The measure in published.py to compare it with; "" if nothing was published."""

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
        """The headline that `asdict` made; keys of later versions are ignored, texts of earlier versions replaced."""
        values = {field.name: content[field.name] for field in fields(cls) if field.name in content}
        for key in ("name", "measure"):
            if key in values:
                values[key] = EARLIER_TEXTS.get(values[key], values[key])
        return cls(**values)


def headlines_of(result: dict[str, Any]) -> list[Headline]:
    """The headlines in a task's JSON."""
    return [Headline.from_json(content) for content in result["headlines"]]


def accuracy_headlines(result: dict[str, Any], title: str, measure: str = "") -> list[Headline]:
    """A headline for each test accuracy in a task's JSON: top-level, in nested objects, and in lists of objects."""
    rows = _accuracies(result, title, measure)
    for key, value in result.items():
        if isinstance(value, dict):
            rows += _accuracies(value, f"{title}: {words(key)}", measure)
        elif is_table(value):
            rows += [row for part in value for row in _accuracies(part, f"{title}: {part.get('name', key)}", measure)]
    return rows


def _accuracies(result: dict[str, Any], name: str, measure: str) -> list[Headline]:
    """The test accuracy of an object, if it has one; for a masked model also the accuracy of the vote over masks."""
    error = result.get("test_accuracy_deviation", result.get("test_standard_error"))
    return [
        Headline(name + suffix, result[key], "accuracy", error if key == "test_accuracy" else None, _chosen(result),
                 measure)
        for key, suffix in (("test_accuracy", ""), ("ensembled_test_accuracy", ", vote over masks"))
        if isinstance(result.get(key), float)
    ]  # fmt: skip


def _chosen(result: dict[str, Any]) -> str:
    """What was chosen on the validation split, as text."""
    parts = [
        f"{name} {number(result[key])}" for key, name in CHOSEN.items() if isinstance(result.get(key), (int, float))
    ]
    if "best_layer" not in result and isinstance(result.get("layers"), list):
        parts.append(f"layers {', '.join(map(str, result['layers']))}")
    return ", ".join(parts)


def is_table(value: Any) -> bool:
    """Whether a JSON value is a non-empty list of objects."""
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)
