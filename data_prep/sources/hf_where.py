"""source.where on the columns of a Hugging Face dataset."""

from collections import Counter
from typing import Any

from data_prep.sources.hf_columns import Features, listed_columns, type_name
from data_prep.sources.where import Where, quoted

BATCH = 10_000
"""Rows whose columns are in memory at a time."""
EXAMPLES = {"int": 1, "uint": 1, "float": 1.0, "double": 1.0, "bool": True, "string": "a", "large_string": "a"}
"""A value of each type that an expression takes, by the beginning of the type's name."""


def check_columns(where: Where, features: Features, split: str, path: str) -> None:
    """Raises ValueError for a column that a split lacks, or whose type does not fit the expression."""
    row = {}
    for column in where.columns:
        if column not in features:
            raise ValueError(
                f"source.where is {quoted(where.expression)}, but {path!r} has no column {column!r} in {split}; it has "
                f"{listed_columns(features)}."
            )
        row[column] = _example(features[column])
        if row[column] is None:
            raise ValueError(
                f"source.where is {quoted(where.expression)}, but the column {column!r} of {path!r} has the type "
                f"{type_name(features[column])}; it must have numbers, strings or booleans."
            )
    where.check(row, f"{path!r}")


def _example(feature: Any) -> Any:
    if hasattr(feature, "names"):  # a ClassLabel: rows have its number
        return 1
    kind = type_name(feature)
    return next((value for start, value in EXAMPLES.items() if kind.startswith(start)), None)


def keep(where: Where, data: Any, split: str, path: str) -> tuple[list[int], dict[str, int]]:
    """The numbers of the rows of a datasets.Dataset that fit, and by reason how many do not.

    Raises ValueError if none fits.
    """
    kept: list[int] = []
    refused: Counter[str] = Counter()
    columns = data.select_columns(where.columns).with_format("arrow")
    rows = (row for batch in columns.iter(BATCH) for row in batch.to_pylist())
    for number, row in enumerate(rows):
        refusal = where.refusal_of_untyped(row)
        if refusal is None:
            kept.append(number)
        else:
            refused[refusal] += 1
    if not kept and refused:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in refused.items())
        raise ValueError(
            f"source.where {quoted(where.expression)} keeps none of the {len(data):,} images in {split} of {path!r} "
            f"({counts}); change it."
        )
    return kept, dict(refused)
