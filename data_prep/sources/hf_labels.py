"""The labels of Hugging Face datasets as numbers of classes.

The classes are those of train: the names of a ClassLabel, or the strings or integers that occur, sorted. Labels of the
other splits are matched by name, as each split may number its classes in its own way.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.sources.base import MAX_CLASSES, UNLABELLED

BOOLEANS = ["False", "True"]
LISTED = 10
"""Classes that an error message lists."""


@dataclass(frozen=True)
class LabelColumn:
    """A column of labels, with its name and dataset for messages."""

    name: str
    path: str

    def check_integer(self, value: int, split: str) -> int:
        """The integer. Raises ValueError if it is not the number of a class."""
        if not UNLABELLED <= value < MAX_CLASSES:
            raise ValueError(
                f"source.label_column {self.name!r} of {self.path!r} has the value {value} in {split}; the number of a "
                f"class must be 0 to {MAX_CLASSES - 1:,}, or {UNLABELLED} for an image without one."
            )
        return value

    def distinct(self, values: Iterable[Any], split: str) -> dict[Any, str]:
        """The names of strings or integers, sorted, without those of unlabelled images."""
        labels = {value for value in values if value is not None and value not in ("", UNLABELLED)}
        for value in labels:
            if not isinstance(value, str):
                self.check_integer(value, split)
        return {value: str(value) for value in sorted(labels, key=lambda value: (isinstance(value, str), value))}

    def positions(self, names: list[str], classes: list[str], split: str) -> list[int]:
        """The number of each name among the classes of train. Raises ValueError for a name that train lacks."""
        numbers = {name: number for number, name in enumerate(classes)}
        for name in names:
            if name not in numbers:
                known = ", ".join(classes[:LISTED]) + (" ..." if len(classes) > LISTED else "")
                right = f"it must be one of {known}" if classes else "train has no labels"
                raise ValueError(
                    f"source.label_column {self.name!r} of {self.path!r} has the class {name!r} in {split}, which "
                    f"train lacks; {right}."
                )
        return [numbers[name] for name in names]


def declared_names(feature: Any) -> list[str] | None:
    """The classes that the numbers in a column stand for; None for a column of strings or plain integers."""
    return BOOLEANS if getattr(feature, "dtype", None) == "bool" else getattr(feature, "names", None)


@dataclass(frozen=True)
class SplitLabels:
    """The labels of one split."""

    values: list[Any]
    """The distinct names or integers, sorted."""
    indices: np.ndarray
    """int64 (N,): the index of each image's label in `values`, -1 for none."""


def read_labels(cells: Any, column: LabelColumn, names: list[str] | None, split: str) -> SplitLabels:
    """The labels that occur in a column, a pyarrow.ChunkedArray; `names` are those that its numbers stand for.

    Raises ValueError for an integer that is not the number of a class.
    """
    import pyarrow.compute as pc

    found = pc.unique(cells).drop_null()
    indices = pc.index_in(cells, value_set=found).fill_null(-1).to_numpy().astype(np.int64)
    values = found.to_pylist()
    if names is not None:
        values = [names[number] if number >= 0 else "" for number in _checked(values, names, column, split)]
    values_in_order = list(column.distinct(values, split))
    numbers = {value: number for number, value in enumerate(values_in_order)}
    sorted_indices = np.array([*(numbers.get(value, -1) for value in values), -1])  # the last is that of index -1
    return SplitLabels(values_in_order, sorted_indices[indices])


def _checked(values: list[Any], names: list[str], column: LabelColumn, split: str) -> list[int]:
    for value in values:
        if not UNLABELLED <= value < len(names):
            raise ValueError(
                f"source.label_column {column.name!r} of {column.path!r} has the value {value} in {split}, which is "
                f"none of its {len(names)} classes; it must be 0 to {len(names) - 1}, or {UNLABELLED} for none."
            )
    return [int(value) for value in values]


def number_labels(
    found: dict[str, SplitLabels], column: LabelColumn, names: list[str] | None
) -> tuple[list[str], dict[str, np.ndarray]]:
    """The classes, and by split the number of each image's class, int32 (N,).

    names: all classes of train, if they are declared; else the classes are those that occur in train. Raises ValueError
    for a label that train lacks, or if there are too many classes.
    """
    classes = names if names is not None else [str(value) for value in found["train"].values]
    if len(classes) > MAX_CLASSES:
        raise ValueError(
            f"source.label_column {column.name!r} of {column.path!r} has {len(classes):,} different values; a dataset "
            f"must have at most {MAX_CLASSES:,} classes."
        )
    numbered = {}
    for split, labels in found.items():
        positions = column.positions([str(value) for value in labels.values], classes, split)
        numbered[split] = np.array([*positions, UNLABELLED], np.int32)[labels.indices]
    return classes, numbered


@dataclass(frozen=True)
class RowLabels:
    """The labels of the rows of a stream."""

    column: LabelColumn
    split: str
    numbers: dict[Any, int] | None
    """The class of each value of the column; None for integers that are the numbers of classes."""

    def number(self, row: dict[str, Any]) -> int:
        """The class of a row, UNLABELLED for none. Raises ValueError for a value that is not a class."""
        value = row[self.column.name]
        if value is None or value in ("", UNLABELLED):
            return UNLABELLED
        if self.numbers is None:
            return self.column.check_integer(value, self.split)
        if value not in self.numbers:
            raise ValueError(
                f"source.label_column {self.column.name!r} of {self.column.path!r} has the value {value!r} in "
                f"{self.split}, which is none of its {len(self.numbers)} classes; it must be one, or {UNLABELLED}."
            )
        return self.numbers[value]
