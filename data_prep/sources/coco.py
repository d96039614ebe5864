"""COCO (Lin et al. 2014): train2017/ and val2017/ with their instance annotations, or those of 2014.

    PATH/train2017/000000000009.jpg ...    PATH/annotations/instances_train2017.json
    PATH/val2017/...                       PATH/annotations/instances_val2017.json

An image shows several objects; its label is the category of the object with the largest area. The official
validation set becomes the split `test`: the official test images were published without annotations.
"""

import json
import logging
import os
import re
from array import array
from collections.abc import Iterator
from operator import index
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from data_prep.config import SourceConfig
from data_prep.sources.base import UNLABELLED, ImageFiles, Images, Source, fingerprint
from data_prep.sources.folders import listed

logger = logging.getLogger(__name__)

YEARS = ("2017", "2014")
SPLITS = {"train": "train", "test": "val"}
"""Split: COCO's name for it."""
LABELS = (  # part of manifests: another text would change the digest of the same set
    "the category of the picture's largest object by area, crowds left out; of equals, that with the smallest "
    "annotation id; -1 without objects"
)
CHUNK = 1 << 20
SPACE = re.compile(r"[ \t\r\n]*")


def open_source(config: SourceConfig) -> Source:
    """Reads the annotations. Raises ValueError naming the folder, annotations or image that is missing or invalid."""
    assert config.path is not None
    root = Path(config.path)
    year = next((year for year in YEARS if (root / f"train{year}").is_dir()), None)
    if year is None:
        raise ValueError(f"source.path {root} has no folder train2017 (or train2014); extract train2017.zip there.")
    splits: dict[str, Images] = {}
    categories: dict[int, str] = {}
    parts: list[str] = []
    for split, official in SPLITS.items():
        folder = root / f"{official}{year}"
        if split != "train" and not folder.is_dir():
            if (root / f"{folder.name}.zip").is_file():
                raise ValueError(f"{root} has {folder.name}.zip, but no {folder.name}/; extract it, or remove it.")
            continue
        instances = _Instances(root / "annotations" / f"instances_{official}{year}.json")
        if categories and instances.categories != categories:
            raise ValueError(
                f"{instances.file} has other categories than the training annotations; download both again."
            )
        categories = instances.categories
        names, labels = instances.labelled()
        _check_presence(folder, names, instances.file)
        splits[split] = ImageFiles(str(folder), names, labels)
        parts += [f"{split}/{name} {label}" for name, label in zip(names, labels.tolist(), strict=True)]
    classes = [categories[number] for number in sorted(categories)]
    return Source(f"COCO {year}", classes, splits, {}, fingerprint(parts), facts={"labels": LABELS})


class _Instances:
    """The contents of an instances_*.json."""

    def __init__(self, file: Path) -> None:
        """Raises ValueError if it is missing, damaged or has no images or categories."""
        self.file = file
        self.categories: dict[int, str] = {}
        self._names: dict[int, str] = {}
        """File names by image id."""
        self._objects: tuple[array[Any], ...] = (array("q"), array("d"), array("q"), array("q"))
        """Of each object: image id, area, annotation id, category id."""
        if not file.is_file():
            raise ValueError(f"{file} is missing; extract annotations_trainval{file.stem[-4:]}.zip there.")
        try:
            with file.open(encoding="utf-8-sig") as text:
                for part, entry in iter_list_entries(text):
                    self._add(part, entry)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not readable as JSON ({error}); download it again.") from error
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"{file} has an invalid entry in {part} ({error!r}); download it again.") from error
        if not self._names or not self.categories:
            raise ValueError(f"{file} lists no {'categories' if self._names else 'images'}; download it again.")

    def _add(self, part: str, entry: dict[str, Any]) -> None:
        if part == "images":
            self._names[index(entry["id"])] = str(entry["file_name"]).lstrip("/")
        elif part == "categories":
            self.categories[index(entry["id"])] = str(entry["name"])
        elif part == "annotations" and not entry["iscrowd"]:
            values = entry["image_id"], entry["area"], entry["id"], entry["category_id"]
            for column, value in zip(self._objects, values, strict=True):
                column.append(value)

    def labelled(self) -> tuple[list[str], np.ndarray]:
        """The file names of the images in the order of their ids, and their labels (N,)."""
        images = np.array(sorted(self._names))
        owners, areas, numbers, categories = (np.array(column) for column in self._objects)
        for what, found, known in (("image_id", owners, images), ("category_id", categories, [*self.categories])):
            unknown = found[~np.isin(found, known)]
            if len(unknown):
                raise ValueError(
                    f"{self.file} has an annotation with {what} {unknown[0]}, which is not listed; download it again."
                )
        labels = np.full(len(images), UNLABELLED)
        order = np.lexsort((numbers, -areas, owners))  # by image, the largest area first, then the smallest id
        owners, first = np.unique(owners[order], return_index=True)
        ranks = np.searchsorted(sorted(self.categories), categories[order][first])
        labels[np.searchsorted(images, owners)] = ranks
        return [self._names[number] for number in images.tolist()], labels


def _check_presence(folder: Path, names: list[str], file: Path) -> None:
    with os.scandir(folder) as entries:
        existing = {entry.name for entry in entries}
    missing = [name for name in names if name not in existing]
    if missing:
        raise ValueError(
            f"{folder} is missing {len(missing)} of the {len(names)} images that {file.name} lists, the first is "
            f"{missing[0]}; extract {folder.name}.zip again."
        )
    extra = sorted(existing.difference(names))
    if extra:
        logger.info(f"{folder}: ignored {len(extra):,} files that {file.name} does not list ({listed(extra)})")


def iter_list_entries(file: TextIO) -> Iterator[tuple[str, Any]]:
    """(key, entry) for each entry of each list in a JSON object, one at a time: the files have up to 450 MB.

    Values that are not lists are ignored. Raises ValueError if the text is not such a JSON object.
    """
    text = _Text(file)
    text.take("{")
    while text.peek() != "}":
        key = text.value()
        text.take(":")
        if text.peek() == "[":
            text.take("[")
            while text.peek() != "]":
                yield key, text.value()
                if text.peek() != "]":
                    text.take(",")
            text.take("]")
        else:
            text.value()
        if text.peek() != "}":
            text.take(",")


class _Text:
    """JSON text, read from the file as needed."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._window, self._position = file, "", 0
        self._passed = 0
        """Number of characters before the window."""
        self._decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            space = SPACE.match(self._window, self._position)
            assert space is not None
            self._position = space.end()
            if self._position < len(self._window) or not self._read_on():
                return self._window[self._position : self._position + 1]

    def take(self, character: str) -> None:
        found = self.peek()
        if found != character:
            what = f"{found!r} instead of {character!r}" if found else "it ends"
            raise ValueError(f"{what} at character {self._passed + self._position}")
        self._position += 1

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self._decode(self._window, self._position)
            except json.JSONDecodeError as error:  # the value may extend beyond the window
                if not self._read_on():
                    raise ValueError(f"{error.msg} at character {self._passed + error.pos}") from error
                continue
            if end < len(self._window) or not self._read_on():  # a number may extend beyond the window
                self._position = end
                return value

    def _read_on(self) -> bool:
        """Moves the window. It at least doubles while a value does not fit, so that the total time is linear."""
        more = self._file.read(max(CHUNK, len(self._window) - self._position))
        self._passed += self._position
        self._window, self._position = self._window[self._position :] + more, 0
        return bool(more)
