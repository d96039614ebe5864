"""Hugging Face datasets: a hub name, a `save_to_disk` folder, or a folder that `load_dataset` understands."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.config import SourceConfig
from data_prep.images.decode import BadImage, Decode
from data_prep.sources.base import UNLABELLED, Encoded, Images, ImageStream, Source, fingerprint

SPLITS = {"train": ("train",), "valid": ("valid", "validation", "val"), "test": ("test",)}
"""Split: the names in a dataset that are taken for it."""


class TableImages(Images):
    """A split on disk, with random access."""

    def __init__(self, table: Any, image_column: str, labels: np.ndarray, name: str) -> None:
        """table: a datasets.Dataset whose images are not decoded; labels (N,)."""
        self.table, self.image_column, self.name = table, image_column, name
        self.labels = labels.astype(np.int32)

    def image(self, index: int, decode: Decode) -> np.ndarray:
        name = f"{self.name}[{index}]"
        return decode(_content(self.table[int(index)][self.image_column], name), name)


class StreamImages:
    """One file of a streamed split."""

    def __init__(self, stream: Any, image_column: str, label_column: str | None, name: str) -> None:
        self.stream, self.image_column, self.label_column, self.name = stream, image_column, label_column, name

    def __iter__(self) -> Iterator[Encoded | BadImage]:
        rows = iter(self.stream)
        for index in count():
            name = f"{self.name}[{index}]"
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # the network, or a damaged file
                raise ValueError(f"{name} can't be read ({_first_line(error)}); run the command again.") from error
            try:
                yield Encoded(name, _content(row[self.image_column], name), _label(row, self.label_column))
            except BadImage as bad:
                yield bad


def open_source(config: SourceConfig) -> Source:
    """Opens the splits and finds the columns. Raises ValueError naming the path, split or column that is invalid."""
    assert config.path is not None
    found = _load(config)
    if "train" not in found:
        raise ValueError(f"source.path {config.path!r} has only the splits {', '.join(found)}; it must have train.")
    features = _features(found["train"], config.path)
    image_column = _image_column(features, config)
    label_column = _label_column(features, config)
    splits: dict[str, Images] = {}
    streams: dict[str, list[ImageStream]] = {}
    for split, names in SPLITS.items():
        data = next((found[name] for name in names if name in found), None)
        if data is None:
            continue
        name = f"{config.path} {split}"
        data = _undecoded(data, image_column)
        if _is_stream(data):
            streams[split] = _streams(data, image_column, label_column, name)
        elif len(data) == 0:
            raise ValueError(f"source.path {config.path!r} has no images in split {split}; it must have some.")
        else:
            splits[split] = TableImages(data, image_column, _labels(data, label_column), name)
    classes = list(getattr(features[label_column], "names", [])) if label_column else []
    if not classes and label_column and not streams:
        classes = [str(number) for number in range(1 + max(int(found.labels.max()) for found in splits.values()))]
    sizes = [f"{split} {len(images)}" for split, images in splits.items()]
    return Source(
        Path(config.path).name,
        classes,
        splits,
        streams,
        fingerprint([*sizes, *(f"{split} {len(found)}" for split, found in streams.items()), *classes]),
    )


def _streams(data: Any, image_column: str, label_column: str | None, name: str) -> list[ImageStream]:
    """One stream for each file of a streamed split."""
    files = [data.shard(data.num_shards, number) for number in range(data.num_shards)]
    return [
        StreamImages(file, image_column, label_column, f"{name}, file {number}" if len(files) > 1 else name)
        for number, file in enumerate(files)
    ]


def _load(config: SourceConfig) -> dict[str, Any]:
    """The splits by the dataset's own names. A `save_to_disk` folder is local and never streamed."""
    import datasets

    assert config.path is not None
    folder = Path(config.path)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            data = datasets.load_from_disk(config.path)
        else:
            data = datasets.load_dataset(config.path, config.subset, streaming=config.streaming)
    except Exception as error:  # the hub, the network and the builders have many kinds of exceptions
        raise ValueError(
            f"source.path {config.path!r} can't be loaded as a Hugging Face dataset ({_first_line(error)})."
        ) from error
    return dict(data) if isinstance(data, dict) else {str(data.split or "train"): data}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _is_stream(data: Any) -> bool:
    import datasets

    return isinstance(data, datasets.IterableDataset)


def _features(data: Any, path: str) -> dict[str, Any]:
    features = data.features
    if features is None and _is_stream(data):
        features = data._resolve_features().features
    if not features:
        raise ValueError(f"source.path {path!r} has no information about its columns; it must have a column of images.")
    return dict(features)


def _image_column(features: dict[str, Any], config: SourceConfig) -> str:
    fitting = [name for name, feature in features.items() if _is_image(feature)]
    return _choose("image_column", config.image_column, fitting, features, config)


def _label_column(features: dict[str, Any], config: SourceConfig) -> str | None:
    """The column of type ClassLabel, else an integer column named label; None if there is neither."""
    import datasets

    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    integers = [
        name for name, feature in features.items() if str(getattr(feature, "dtype", "")).startswith(("int", "uint"))
    ]
    if config.label_column is not None:
        return _choose("label_column", config.label_column, [*classes, *integers], features, config)
    fitting = classes or [name for name in integers if name == "label"]
    return _choose("label_column", None, fitting, features, config) if fitting else None


def _is_image(feature: Any) -> bool:
    """Whether it is an Image, or the same in parquet files without type information."""
    import datasets

    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and {"bytes", "path"} <= set(feature))


def _choose(option: str, wanted: str | None, fitting: list[str], features: dict[str, Any], config: SourceConfig) -> str:
    if wanted is not None:
        if wanted not in fitting:
            choice = ", ".join(fitting) or f"a column of the right type, and none of {', '.join(features)} has it"
            raise ValueError(f"source.{option} is {wanted!r}; in {config.path!r} it must be {choice}.")
        return wanted
    if len(fitting) != 1:
        what = f"several columns: {', '.join(fitting)}" if fitting else f"none of the columns {', '.join(features)}"
        raise ValueError(f"source.{option} is not set, and the types in {config.path!r} fit {what}; name a column.")
    return fitting[0]


def _undecoded(data: Any, column: str) -> Any:
    """The split with its images as stored bytes."""
    import datasets

    feature = _features(data, column)[column]
    return data.cast_column(column, datasets.Image(decode=False)) if isinstance(feature, datasets.Image) else data


def _content(value: dict[str, Any] | None, name: str) -> bytes:
    """The encoded image, from the row or from the file that the row names. Raises BadImage if there is none."""
    if value and value.get("bytes") is not None:
        return value["bytes"]
    if not value or not value.get("path"):
        raise BadImage(name, "empty", "the row has no image")
    from datasets.utils.file_utils import xopen

    try:
        with xopen(value["path"], "rb") as file:
            return file.read()
    except OSError as error:
        raise BadImage(name, "unreadable", str(error)) from error


def _labels(table: Any, column: str | None) -> np.ndarray:
    if column is None:
        return np.full(len(table), UNLABELLED)
    values = table.select_columns([column]).with_format("arrow")[:].column(column).cast("int64")
    return np.maximum(values.fill_null(UNLABELLED).to_numpy(), UNLABELLED)


def _label(row: dict[str, Any], column: str | None) -> int:
    return UNLABELLED if column is None or row[column] is None else max(int(row[column]), UNLABELLED)
