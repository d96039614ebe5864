"""Labelled pictures as a classifier sees them: rows of features and labels, and how many there are of each class."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from pipeline.evaluate.context import Evaluation, Pictures
from pipeline.evaluate.features.pooled import pooled_features

SPLITS = ("train", "valid", "test")
BASELINES = ("raw_pixel", "color_histogram")
ROWS_AT_ONCE = 8192


class Rows(Protocol):
    """Features of N pictures, some rows at a time. An array or a memory map (N, D) is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, chosen: Any, /) -> np.ndarray:
        """float32 (n, D) at a slice or at an array of row numbers."""
        ...


@dataclass(frozen=True)
class LazyRows:
    """Features that are made when they are read: of several layers, or of the colors alone."""

    count: int
    read: Callable[[Any], np.ndarray]
    """Of a slice or row numbers to float32 (n, D)."""

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, chosen: Any, /) -> np.ndarray:
        return self.read(chosen)


class Labelled(NamedTuple):
    """Pictures and their classes."""

    features: Rows  # float32 (N, D)
    labels: np.ndarray  # int (N,)


def concatenated(layers: Sequence[Labelled]) -> Labelled:
    """Several layers' features of the same pictures as one, (N, sum of D)."""
    labels = layers[0].labels
    read = lambda chosen: np.concatenate([layer.features[chosen] for layer in layers], axis=1)  # noqa: E731
    return Labelled(LazyRows(len(labels), read), labels)


def in_blocks(features: Rows) -> Iterator[tuple[slice, np.ndarray]]:
    """(place, float32 (n, D)) of all rows in order, so that a large memory map is never wholly in memory."""
    for start in range(0, len(features), ROWS_AT_ONCE):
        place = slice(start, min(start + ROWS_AT_ONCE, len(features)))
        yield place, np.array(features[place], np.float32)


def raw_pixels(tokens: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """The colours themselves, float32 (N, 3 T), of tokens (N, T)."""
    return palette[tokens].reshape(len(tokens), -1)


def color_histogram(tokens: np.ndarray, colors: int) -> np.ndarray:
    """The share of each palette colour, float32 (N, V), of tokens (N, T)."""
    pictures, positions = tokens.shape
    cells = tokens.astype(np.int64) + colors * np.arange(pictures)[:, None]
    counts = np.bincount(cells.ravel(), minlength=pictures * colors)
    return (counts.reshape(pictures, colors) / positions).astype(np.float32)


def baselines(evaluation: Evaluation, pictures: Pictures) -> dict[str, Labelled]:
    """Raw pixels and colour histograms of the pictures, by name."""
    tokens = pictures.tokens()  # uint16 (N, T)
    palette, colors = evaluation.shards.palette, evaluation.shards.colors
    ways = (lambda chosen: raw_pixels(tokens[chosen], palette), lambda chosen: color_histogram(tokens[chosen], colors))
    rows = [LazyRows(len(tokens), read) for read in ways]
    return {name: Labelled(features, pictures.labels) for name, features in zip(BASELINES, rows, strict=True)}


def layer_name(layer: int) -> str:
    """What a layer is called among the work items of a task."""
    return f"layer-{layer:03d}"


def layers_of(features: np.ndarray, labels: np.ndarray) -> dict[str, Labelled]:
    """Each layer of float32 (L+1, N, D), by name."""
    return {layer_name(layer): Labelled(features[layer], labels) for layer in range(len(features))}


def known_features(evaluation: Evaluation, pictures: Pictures) -> dict[str, Labelled]:
    """The baselines and every layer of pictures, by name; a masked model sees the first mask. All ranks call it."""
    return baselines(evaluation, pictures) | layers_of(pooled_features(evaluation, pictures), pictures.labels)


def labelled_splits(evaluation: Evaluation, task: str, splits: Collection[str] = SPLITS) -> dict[str, Pictures]:
    """The labelled pictures of train and of whatever else is needed. Says which classes `valid` or `test` lacks.

    Raises ValueError if a split is absent or unlabelled, or if train has a single class.
    """
    pictures = _known_pictures(evaluation, task, splits)
    for name, absent in absent_classes(evaluation, pictures).items():
        if absent:
            evaluation.log(f"{task}: no labelled picture in {name} of {_some(absent)}")
    return pictures


def why_unlabelled(evaluation: Evaluation, splits: Collection[str] = SPLITS) -> str | None:
    """Why nothing can be probed on this shard set: a split is absent or has no labels, or train has a single class."""
    try:
        _known_pictures(evaluation, "this task", splits)
    except ValueError as error:
        return str(error)
    return None


def _known_pictures(evaluation: Evaluation, task: str, splits: Collection[str]) -> dict[str, Pictures]:
    pictures = {name: evaluation.pictures(name, labelled=True) for name in splits}
    if len(np.unique(pictures["train"].labels)) < 2:
        raise ValueError(f"{evaluation.shards.path} has one class in train; {task} needs two or more.")
    return pictures


def images_by_class(evaluation: Evaluation, pictures: Pictures) -> list[int]:
    """How many of the pictures are of each class, in the order of the shard set's classes."""
    return np.bincount(pictures.labels, minlength=len(evaluation.shards.classes)).tolist()


def absent_classes(evaluation: Evaluation, pictures: dict[str, Pictures]) -> dict[str, list[str]]:
    """By split, the names of the classes that it has no picture of while another split has."""
    counts = {name: np.array(images_by_class(evaluation, chosen)) for name, chosen in pictures.items()}  # (C,) each
    known = np.sum(list(counts.values()), axis=0) > 0
    names = evaluation.shards.classes
    return {split: [names[n] for n in np.flatnonzero(known & (count == 0))] for split, count in counts.items()}


def description(evaluation: Evaluation, pictures: dict[str, Pictures]) -> dict[str, Any]:
    """What a result says of its pictures: see the docstring of linear_probe.py."""
    train, test = pictures["train"].labels, pictures["test"].labels
    return {
        "classes": len(np.unique(train)),
        "class_names": evaluation.shards.classes,
        **{f"{name}_images": len(chosen) for name, chosen in pictures.items()},
        "images_by_class": {name: images_by_class(evaluation, chosen) for name, chosen in pictures.items()},
        "absent_classes": absent_classes(evaluation, pictures),
        "majority_class_test_accuracy": float((test == np.bincount(train).argmax()).mean()),
    }


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more classes"
