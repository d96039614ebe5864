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
Results = dict[str, dict[str, Any]]
"""Task name to the content of its JSON."""
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
    interval: tuple[float, float] | None = None
    """The 95% confidence interval of an accuracy, as fractions."""
    per_class: float | None = None
    """For an accuracy: the mean over the classes of their accuracies."""

    @property
    def text(self) -> str:
        """The number, with its unit and error. An error of zero is not shown: one image, or none wrong, gives it."""
        if self.value is None:
            return MISSING
        if self.unit == "accuracy":
            return percent(self.value, self.error or None, self.interval)
        return f"{self.value:.4f}" if self.unit == "nats" else f"{self.value:.3f}"

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Headline":
        """The headline that `asdict` made; keys of later versions are ignored, texts of earlier versions replaced."""
        values = {field.name: content[field.name] for field in fields(cls) if field.name in content}
        for key in ("name", "measure"):
            if key in values:
                values[key] = EARLIER_TEXTS.get(values[key], values[key])
        if values.get("interval") is not None:
            values["interval"] = tuple(values["interval"])
        return cls(**values)


def headlines_of(result: dict[str, Any]) -> list[Headline]:
    """The headlines in a task's JSON."""
    return [Headline.from_json(content) for content in result["headlines"]]


def measured_split(result: dict[str, Any]) -> str:
    """The split on which a task's numbers were measured: probes use test, the other tasks name it."""
    return "test" if "test_images" in result else result.get("split", "test")


def images_of(result: dict[str, Any], headline: Headline) -> int | None:
    """The number of images on which a headline of a task was measured; None if its JSON has no such number."""
    distance = result.get("distance")
    by_unit = {
        "accuracy": result.get("test_images"),
        "nats": result.get("images"),
        "distance": distance.get("images") if isinstance(distance, dict) else None,
    }
    found = by_unit.get(headline.unit)
    return found if isinstance(found, int) else None


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
    """The test accuracy of an object, if it has one; for a masked model also the accuracy of the vote over masks.

    Its error is the deviation over repeats if there are several; otherwise it has an interval, which earlier versions
    did not write: they wrote the standard error.
    """
    rows, chosen = [], _chosen(result)
    if isinstance(result.get("test_accuracy"), float):
        earlier = None if "test_accuracy_interval" in result else result.get("test_standard_error")
        error, interval = result.get("test_accuracy_deviation", earlier), _interval(result, "test_accuracy")
        per_class = result.get("test_mean_per_class_accuracy")
        rows.append(Headline(name, result["test_accuracy"], "accuracy", error, chosen, measure, interval, per_class))
    if isinstance(result.get("ensembled_test_accuracy"), float):
        voted, interval = result["ensembled_test_accuracy"], _interval(result, "ensembled_test_accuracy")
        vote = f"{name}, vote over masks"
        rows.append(Headline(vote, voted, "accuracy", None, chosen, measure, interval))
    return rows


def _interval(result: dict[str, Any], key: str) -> tuple[float, float] | None:
    """The interval of an accuracy, as a tuple."""
    found = result.get(f"{key}_interval")
    return None if found is None else (found[0], found[1])


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
