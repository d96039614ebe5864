"""Labelled images as input of a classifier: rows of features with their labels, and counts by class."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from pipeline.evaluate.context import Evaluation, ImageSubset
from pipeline.evaluate.features.pooled import pooled_features

SPLITS = ("train", "valid", "test")
BASELINES = ("raw_pixel", "color_histogram")
ROWS_AT_ONCE = 8192


class Rows(Protocol):
    """Features of N images, read some rows at a time; an array or a memory map (N, D) qualifies."""

    def __len__(self) -> int: ...

    def __getitem__(self, chosen: Any, /) -> np.ndarray:
        """float32 (n, D) at a slice or at an array of row numbers."""
        ...


@dataclass(frozen=True)
class LazyRows:
    """Features that are computed when they are read: concatenated layers, raw pixels, or color histograms."""

    count: int
    read: Callable[[Any], np.ndarray]
    """Maps a slice or row numbers to float32 (n, D)."""

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, chosen: Any, /) -> np.ndarray:
        return self.read(chosen)


class Labelled(NamedTuple):
    """Images and their classes."""

    features: Rows  # float32 (N, D)
    labels: np.ndarray  # int (N,)


def concatenated(layers: Sequence[Labelled]) -> Labelled:
    """The features of several layers of the same images, concatenated: (N, sum of D)."""
    labels = layers[0].labels
    read = lambda chosen: np.concatenate([layer.features[chosen] for layer in layers], axis=1)  # noqa: E731
    return Labelled(LazyRows(len(labels), read), labels)


def in_blocks(features: Rows) -> Iterator[tuple[slice, np.ndarray]]:
    """(slice, float32 (n, D)) of all rows in order, so that a large memory map is never entirely in memory."""
    for start in range(0, len(features), ROWS_AT_ONCE):
        rows = slice(start, min(start + ROWS_AT_ONCE, len(features)))
        yield rows, np.array(features[rows], np.float32)


def raw_pixels(tokens: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """The RGB values, float32 (N, 3 T), of tokens (N, T)."""
    return palette[tokens].reshape(len(tokens), -1)


def color_histogram(tokens: np.ndarray, colors: int) -> np.ndarray:
    """The fraction of pixels with each palette color, float32 (N, V), of tokens (N, T)."""
    images, positions = tokens.shape
    cells = tokens.astype(np.int64) + colors * np.arange(images)[:, None]
    counts = np.bincount(cells.ravel(), minlength=images * colors)
    return (counts.reshape(images, colors) / positions).astype(np.float32)


def baselines(evaluation: Evaluation, images: ImageSubset) -> dict[str, Labelled]:
    """Raw pixels and color histograms of the images, by name."""
    tokens = images.tokens()  # uint16 (N, T)
    palette, colors = evaluation.shards.palette, evaluation.shards.colors
    readers = (
        lambda chosen: raw_pixels(tokens[chosen], palette),
        lambda chosen: color_histogram(tokens[chosen], colors),
    )
    rows = [LazyRows(len(tokens), read) for read in readers]
    return {name: Labelled(features, images.labels) for name, features in zip(BASELINES, rows, strict=True)}


def layer_name(layer: int) -> str:
    """The name of a layer among the work items of a task."""
    return f"layer-{layer:03d}"


def layers_of(features: np.ndarray, labels: np.ndarray) -> dict[str, Labelled]:
    """The layers of features float32 (L+1, N, D), by name."""
    return {layer_name(layer): Labelled(features[layer], labels) for layer in range(len(features))}


def known_features(evaluation: Evaluation, images: ImageSubset) -> dict[str, Labelled]:
    """The baselines and the features of every layer, by name; of a masked model under the first mask. All ranks call
    it."""
    return baselines(evaluation, images) | layers_of(pooled_features(evaluation, images), images.labels)


def labelled_splits(evaluation: Evaluation, task: str, splits: Collection[str] = SPLITS) -> dict[str, ImageSubset]:
    """The labelled images of train and of the other splits. Logs which classes a split lacks.

    Raises ValueError if a split is absent or unlabelled, or if train has a single class.
    """
    images = _labelled_images(evaluation, task, splits)
    for name, absent in absent_classes(evaluation, images).items():
        if absent:
            evaluation.log(f"{task}: no labelled image in {name} of {_shortened(absent)}")
    return images


def why_unlabelled(evaluation: Evaluation, splits: Collection[str] = SPLITS) -> str | None:
    """The reason why probes can't run on this shard set: a split is absent or unlabelled, or train has a single class;
    None if they can."""
    try:
        _labelled_images(evaluation, "this task", splits)
    except ValueError as error:
        return str(error)
    return None


def _labelled_images(evaluation: Evaluation, task: str, splits: Collection[str]) -> dict[str, ImageSubset]:
    images = {name: evaluation.images(name, labelled=True) for name in splits}
    if len(np.unique(images["train"].labels)) < 2:
        raise ValueError(f"{evaluation.shards.path} has a single class in train; {task} needs at least two.")
    return images


def occurring_classes(images: dict[str, ImageSubset]) -> np.ndarray:
    """The labels that occur in any of the splits, ascending, int (C,).

    Results list these only: labels may have gaps, and a table over all numbers up to the largest label may be huge.
    """
    return np.unique(np.concatenate([chosen.labels for chosen in images.values()]))


def images_by_class(images: ImageSubset, classes: np.ndarray) -> list[int]:
    """The number of images of each of these classes."""
    return np.bincount(np.searchsorted(classes, images.labels), minlength=len(classes)).tolist()


def absent_classes(evaluation: Evaluation, images: dict[str, ImageSubset]) -> dict[str, list[str]]:
    """By split, the names of the classes of which it has no image although another split has some."""
    names, classes = evaluation.shards.classes, occurring_classes(images)
    return {split: [names[label] for label in np.setdiff1d(classes, chosen.labels)] for split, chosen in images.items()}


def description(evaluation: Evaluation, images: dict[str, ImageSubset]) -> dict[str, Any]:
    """What a result records about its images: see the docstring of linear_probe.py."""
    train, test, classes = images["train"].labels, images["test"].labels, occurring_classes(images)
    labels, counts = np.unique(train, return_counts=True)
    return {
        "classes": len(labels),
        "class_names": [evaluation.shards.classes[label] for label in classes],
        "class_labels": classes.tolist(),
        **{f"{name}_images": len(chosen) for name, chosen in images.items()},
        "images_by_class": {name: images_by_class(chosen, classes) for name, chosen in images.items()},
        "absent_classes": absent_classes(evaluation, images),
        "majority_class_test_accuracy": float((test == labels[counts.argmax()]).mean()),
    }


def _shortened(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more classes"
