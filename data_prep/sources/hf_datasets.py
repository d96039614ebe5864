"""Hugging Face datasets: a hub name, a `save_to_disk` folder, or a folder that `load_dataset` understands."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from data_prep.config import SourceConfig
from data_prep.images.decode import BadImage, Decode
from data_prep.sources.base import UNLABELLED, Encoded, Images, ImageStream, Source, fingerprint
from data_prep.sources.hf_columns import Features, has_label_type, image_column, label_column
from data_prep.sources.hf_files import (
    class_names,
    distinct_values,
    end_reading,
    local_tables,
    refuse_damaged,
    refuse_other_columns,
)
from data_prep.sources.hf_labels import (
    LabelColumn,
    RowLabels,
    SplitLabels,
    declared_names,
    number_labels,
    read_labels,
)
from data_prep.sources.hf_where import check_columns, keep
from data_prep.sources.where import Where

SPLITS = {"train": ("train",), "valid": ("valid", "validation", "val"), "test": ("test",)}
"""Split: the names in a dataset that are taken for it."""
LISTED = 20
"""Subsets that an error message lists."""
TABLES = ("parquet", "arrow")
"""Builders of `datasets` whose files have the columns."""
FOLDERS = "imagefolder"
"""The builder that takes the folders of images for classes."""
GENERIC = "An error occurred while generating the dataset"
"""The beginning of errors of `datasets` that have the cause further down, or in another error."""


class TableImages(Images):
    """A split on disk, with random access."""

    def __init__(self, table: Any, image_column: str, labels: np.ndarray, name: str) -> None:
        """table: a datasets.Dataset whose images are not decoded; labels (N,)."""
        self.table, self.image_column, self.split = table, image_column, name
        self.labels = labels.astype(np.int32)

    def name(self, index: int) -> str:
        return f"{self.split}[{index}]"

    def image(self, index: int, decode: Decode) -> np.ndarray:
        name = self.name(index)
        return decode(_content(self.table[int(index)][self.image_column], name), name)


class StreamImages:
    """One file of a streamed split."""

    def __init__(
        self, stream: Any, image_column: str, labels: RowLabels | None, where: Where | None, files: list[str], name: str
    ) -> None:
        """files: those on this machine that it may be, to name one that is damaged."""
        self.stream, self.image_column, self.labels, self.files, self.name = stream, image_column, labels, files, name
        self.where = where

    def __iter__(self) -> Iterator[Encoded | BadImage]:
        rows = iter(self.stream)
        for index in count():
            name = f"{self.name}[{index}]"
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # the network, or a damaged file
                end_reading(error)
                refuse_damaged(self.files, completely=True)
                raise ValueError(f"{name} can't be read ({_cause(error)}); run the command again.") from error
            if self.where is not None and (refusal := self.where.refusal_of_untyped(row)):
                yield BadImage(name, refusal)
                continue
            label = UNLABELLED if self.labels is None else self.labels.number(row)
            try:
                yield Encoded(name, _content(row[self.image_column], name), label)
            except BadImage as bad:
                yield bad


@dataclass(frozen=True)
class Split:
    """One split of a dataset, reduced to the columns of images and labels."""

    name: str
    data: Any
    """A datasets.Dataset or IterableDataset."""
    files: list[str]
    """Its parquet and arrow files on this machine."""
    labelled: bool
    """Whether it has the column of labels."""
    names: list[str] | None
    """The classes that the numbers in the column of labels stand for; None if they are not declared."""
    folders: set[str]
    """Those of the classes that have a folder in this split, in a folder of images, which declares those of all."""
    filtered: dict[str, int]
    """By reason, the numbers of rows that source.where excludes; empty for a stream."""
    kept: list[int] | None
    """The rows that source.where keeps, of a split with random access; None for all."""


def open_source(config: SourceConfig) -> Source:
    """Opens the splits and finds the columns. Raises ValueError naming the path, split or column that is invalid."""
    assert config.path is not None
    builder, found, files = _load(config)
    if "train" not in found:
        raise ValueError(f"source.path {config.path!r} has only the splits {', '.join(found)}; it must have train.")
    features = _features(found["train"], config.path)
    images = image_column(features, config)
    labels = label_column(features, config)
    where = None if config.where is None else Where(config.where)
    if where is not None:
        check_columns(where, features, "train", config.path)
    if builder is not None and config.streaming and hasattr(builder.config, "columns"):
        used = [images, labels, *(where.columns if where else [])]
        builder.config.columns = list(dict.fromkeys(column for column in used if column in features))
        found = builder.as_streaming_dataset()  # again: parquet files are then read without their other columns
    parts = []
    for split, names in SPLITS.items():
        name = next((name for name in names if name in found), None)
        if name is not None:
            parts.append(_split(split, found[name], files.get(name, []), images, labels, where, config.path))
    column = None if labels is None else LabelColumn(labels, config.path)
    if _is_stream(parts[0].data):
        return _streamed(config.path, parts, images, column, where)
    return _in_tables(config.path, parts, images, column)


def _split(
    split: str, data: Any, files: list[str], images: str, labels: str | None, where: Where | None, path: str
) -> Split:
    """Only the columns of images and labels are read: another one may be large, damaged, or need other packages."""
    features = _features(data, path)
    if images not in features:
        raise ValueError(f"source.path {path!r} has no column {images!r} in {split}; each split must have one.")
    of_folders = data.info.builder_name == FOLDERS
    tables = [] if of_folders else local_tables(files)
    names = None
    if labels in features:
        if not has_label_type(features[labels]):
            raise ValueError(f"source.label_column {labels!r} of {path!r} has another type in {split} than in train.")
        names = class_names(tables, labels) or declared_names(features[labels])
    folders = {PurePath(file).parent.name for file in files} & set(names or []) if of_folders else set()
    used, filtered, kept = [images, labels], dict[str, int](), None
    if where is not None:
        check_columns(where, features, split, path)
        if _is_stream(data):
            used += where.columns
        else:
            kept, filtered = keep(where, data, split, path)
    data = data.select_columns(list(dict.fromkeys(column for column in used if column in features)))
    return Split(split, _undecoded(data, images), tables, labels in features, names, folders, filtered, kept)


def _in_tables(path: str, parts: list[Split], images: str, column: LabelColumn | None) -> Source:
    """The source of splits with random access.

    Classes are numbered before source.where excludes rows, as in streams, so that they do not depend on it.
    """
    classes: list[str] = []
    found: dict[str, SplitLabels] = {}
    numbers: dict[str, np.ndarray] = {}
    for part in parts:
        if len(part.data) == 0:
            raise ValueError(f"source.path {path!r} has no images in split {part.name}; it must have some.")
        if column is not None and part.labelled:
            cells = part.data.select_columns([column.name]).with_format("arrow")[:].column(column.name)
            found[part.name] = read_labels(cells, column, part.names, part.name)
        else:
            found[part.name] = SplitLabels([], np.full(len(part.data), UNLABELLED))
    if column is not None:
        # The classes of a folder of images are those that occur in train; the folders of all splits are declared.
        of_folders = parts[0].data.info.builder_name == FOLDERS
        classes, numbers = number_labels(found, column, None if of_folders else parts[0].names)
    splits: dict[str, Images] = {}
    for part in parts:
        labels = numbers.get(part.name, found[part.name].indices)
        data = part.data
        if part.kept is not None:
            data, labels = data.select(part.kept), labels[part.kept]
        splits[part.name] = TableImages(data, images, labels, f"{path} {part.name}")
    sizes = [f"{split} {len(images)}" for split, images in splits.items()]
    filtered = {part.name: part.filtered for part in parts if part.filtered}
    return Source(Path(path).name, classes, splits, {}, fingerprint([*sizes, *classes]), filtered=filtered)


def _streamed(path: str, parts: list[Split], images: str, column: LabelColumn | None, where: Where | None) -> Source:
    """The source of splits that are streamed.

    Classes that are not declared are read from the column of labels of the files on this machine; from elsewhere,
    integers are taken for the numbers of classes.
    """
    classes: list[str] = []
    streams: dict[str, list[ImageStream]] = {}
    for part in parts:
        labels = None
        if column is not None and part.labelled:
            declared = enumerate(part.names or [])
            values: dict[Any, str] = {n: name for n, name in declared if not part.folders or name in part.folders}
            if part.names is None and part.files:
                values = column.distinct(distinct_values(part.files, column.name), part.name)
            elif part.names is None:
                _refuse_strings(part, column)
            if part is parts[0]:  # train
                classes = list(values.values())
            positions = column.positions(list(values.values()), classes, part.name)
            labels = RowLabels(column, part.name, dict(zip(values, positions, strict=True)) if values else None)
        streams[part.name] = _streams(part, images, labels, where, f"{path} {part.name}")
    sizes = [f"{split} {len(found)}" for split, found in streams.items()]
    return Source(Path(path).name, classes, {}, streams, fingerprint([*sizes, *classes]))


def _refuse_strings(part: Split, column: LabelColumn) -> None:
    if part.names is None and "string" in _features(part.data, column.path)[column.name].dtype:
        raise ValueError(
            f"source.label_column {column.name!r} of {column.path!r} has strings, whose classes are unknown until all "
            f"are read; set source.streaming false, or name a column of type ClassLabel, bool or integer."
        )


def _streams(part: Split, images: str, labels: RowLabels | None, where: Where | None, name: str) -> list[ImageStream]:
    """One stream for each file of a streamed split."""
    shards = [part.data.shard(part.data.num_shards, number) for number in range(part.data.num_shards)]
    one_each = len(part.files) == len(shards)
    files = [[file] for file in part.files] if one_each else [part.files] * len(shards)
    return [
        StreamImages(shard, images, labels, where, files[number], f"{name}, file {number}" if len(shards) > 1 else name)
        for number, shard in enumerate(shards)
    ]


def _load(config: SourceConfig) -> tuple[Any, dict[str, Any], dict[str, list[str]]]:
    """The builder, and the splits and their files by the dataset's own names.

    A `save_to_disk` folder has no builder; it is local and never streamed.

    Raises ValueError naming the path, the subsets that exist, or the file that is damaged.
    """
    import datasets

    assert config.path is not None
    folder = Path(config.path)
    builder = None
    files: dict[str, list[str]] = {}
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        if config.subset is not None:
            raise ValueError(
                f"source.subset is {config.subset!r}, but {config.path!r} is a folder of save_to_disk, which has no "
                f"subsets; remove source.subset."
            )
        tables = [str(file) for file in sorted(folder.rglob("*.arrow"))]
        load = partial(datasets.load_from_disk, config.path)
    else:
        builder = _builder(config)
        if builder.info.builder_name in (*TABLES, FOLDERS):
            files = {str(split): list(map(str, names)) for split, names in (builder.config.data_files or {}).items()}
            _refuse_shared(files)
        tables = local_tables(file for names in files.values() for file in names)
        load = partial(_built, builder, config.streaming)
    refuse_damaged(tables)
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # it logs errors that it raises
    try:
        data = load()
    except Exception as error:  # the network and the builders have many kinds of exceptions
        end_reading(error)
        refuse_damaged(tables, completely=True)
        refuse_other_columns(tables)
        raise _not_loaded(config, error) from error
    return builder, (dict(data) if isinstance(data, dict) else {str(data.split or "train"): data}), files


def _builder(config: SourceConfig) -> Any:
    import datasets

    try:
        return datasets.load_dataset_builder(config.path, config.subset)
    except Exception as error:  # the hub and the network have many kinds of exceptions
        if isinstance(error, ValueError):
            _refuse_subset(config)
        raise _not_loaded(config, error) from error


def _refuse_shared(files: dict[str, list[str]]) -> None:
    """Raises ValueError for a file in two splits: `datasets` takes test/train/a.jpg, say, for both."""
    splits: dict[str, str] = {}
    for split in (name for names in SPLITS.values() for name in names if name in files):
        for file in files[split]:
            if splits.setdefault(file, split) != split:
                raise ValueError(
                    f"{file} would be in {splits[file]} and in {split}, as its path has the names of both; rename its "
                    f"folder, or read images in folders with source.kind image_folder."
                )


def _built(builder: Any, streaming: bool) -> Any:
    if streaming:
        return builder.as_streaming_dataset()
    builder.download_and_prepare()
    return builder.as_dataset()


def _not_loaded(config: SourceConfig, error: Exception) -> ValueError:
    return ValueError(f"source.path {config.path!r} can't be loaded as a Hugging Face dataset ({_cause(error)}).")


def _refuse_subset(config: SourceConfig) -> None:
    """Raises ValueError with the names of the subsets, if there are any and `source.subset` is none of them."""
    import datasets

    try:
        names = datasets.get_dataset_config_names(config.path)
    except Exception:  # it can't be loaded for another reason
        return
    if names and config.subset not in names and (len(names) > 1 or config.subset is not None):
        value = "not set" if config.subset is None else repr(config.subset)
        listed = ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
        raise ValueError(f"source.subset is {value}; in {config.path!r} it must be one of {listed}.")


def _cause(error: BaseException) -> str:
    """The first line of an error, or of its cause if it only states that something failed."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith(GENERIC):
        if len(lines) == 1 and error.__cause__ is not None:
            return _cause(error.__cause__)
        return " ".join(lines[1:4]) or GENERIC  # what differs between files, and in which
    return (lines or [type(error).__name__])[0].rstrip(".")


def _is_stream(data: Any) -> bool:
    import datasets

    return isinstance(data, datasets.IterableDataset)


def _features(data: Any, path: str) -> Features:
    features = data.features
    if features is None and _is_stream(data):
        features = data._resolve_features().features
    if not features:
        raise ValueError(f"source.path {path!r} has no information about its columns; it must have a column of images.")
    return dict(features)


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
