"""The table of all headlines, with baselines beside them, which the report and the model card show."""

from dataclasses import dataclass
from typing import Any

from pipeline.results.claims import ACCURACY_BASELINES, COUNT_BASELINES, untrained_row, value_of
from pipeline.results.headline import Headline, Results, headlines_of, images_of
from pipeline.results.text import MISSING, percent


@dataclass(frozen=True)
class Numbers:
    """A table of texts."""

    head: list[str]
    rows: list[list[str]]
    text: int = 2
    """The number of columns of text, before those of numbers: measure and choice."""


def numbers_table(results: Results, random_weights: Results) -> Numbers:
    """A row for each headline. Columns of baselines without any value are dropped."""
    rows = []
    for task, result in results.items():
        for row in headlines_of(result):
            random = untrained_row(row, result, random_weights.get(task))
            rows.append(_row(row, result, MISSING if random is None else random.text))
    head = ["Measure", "Chosen", "This model", "Random weights", *ACCURACY_BASELINES, "Color counts"]
    head += ["Mean per class", "Better", "n"]
    shown = [place for place in range(len(head)) if place <= Numbers.text or any(row[place] != MISSING for row in rows)]
    return Numbers([head[place] for place in shown], [[row[place] for place in shown] for row in rows])


def _row(row: Headline, result: dict[str, Any], untrained: str) -> list[str]:
    images, accuracy = images_of(result, row), row.unit == "accuracy"
    baselines = [percent(value_of(result, key)) if accuracy else MISSING for key in ACCURACY_BASELINES.values()]
    return [
        row.name,
        row.detail,
        row.text,
        untrained,
        *baselines,
        _best_counts(result) if row.unit == "nats" else MISSING,
        percent(row.per_class),
        "higher" if accuracy else "lower",
        MISSING if images is None else f"{images:,}",
    ]


def _best_counts(result: dict[str, Any]) -> str:
    """The lowest loss of the baselines that count colors; not beside a masked model, which sees other pixels."""
    found = [value_of(result, key) for key in COUNT_BASELINES.values()]
    values = [value for value in found if value is not None]
    return f"{min(values):.4f}" if values and not result.get("masked") else MISSING


def legend(numbers: Numbers) -> str:
    """Explains the columns that the table has, and the errors."""
    cells = [cell for row in numbers.rows for cell in row]
    sentences = ["n: the number of images."] if "n" in numbers.head else []
    if any("(" in row[numbers.text] for row in numbers.rows):
        sentences.append("In brackets: the 95% Wilson interval of an accuracy.")
    if any(" ± " in cell for cell in cells):
        sentences.append("±: the deviation over repeats, or in results of earlier versions the standard error.")
    explained = {
        "Random weights": "Random weights: the same architecture with initial weights (--weights random).",
        "Raw pixels": "Raw pixels and color histograms: the same classifier without the model.",
        "Color counts": "Color counts: the best of the baselines that count colors in the train split.",
        "Mean per class": "Mean per class: every class has the same weight.",
    }
    return " ".join(sentences + [sentence for name, sentence in explained.items() if name in numbers.head])
