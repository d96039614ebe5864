"""Places205 (Zhou et al. 2014): images of 256x256 pixels below images256/, and a list of them for each split.

    PATH/data/vision/torralba/deeplearning/images256/a/abbey/gsun_*.jpg   or   PATH/images256/...
    PATH/trainvalsplit_places205/{train,val}_places205.csv                or   PATH/...

A line of a list is "a/abbey/gsun_x.jpg 0": an image and the number of its class. The name of the class is the path of
its folder without the initial letter. The official validation list becomes the split `test`: the official test images
were published without classes.
"""

from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.config import SourceConfig
from data_prep.sources.base import ImageFiles, Source, fingerprint

IMAGE_FOLDERS = ("data/vision/torralba/deeplearning/images256", "images256")
LIST_FOLDERS = ("trainvalsplit_places205", ".")
LISTS = {"train": "train_places205.csv", "test": "val_places205.csv"}


def open_source(config: SourceConfig) -> Source:
    """Reads the lists. Raises ValueError for a missing folder or list, and for inconsistent lists."""
    assert config.path is not None
    root = Path(config.path)
    images = next((root / name for name in IMAGE_FOLDERS if (root / name).is_dir()), None)
    if images is None:
        raise ValueError(f"source.path {root} has no {IMAGE_FOLDERS[0]}; extract imagesPlaces205_resize.tar.gz there.")
    lists = {split: _find_list(root, name) for split, name in LISTS.items()}
    folders: dict[int, str] = {}
    labels = {split: _labels(file, folders) for split, file in lists.items()}
    _check_classes(folders, labels["train"], lists, images)
    splits = {split: ImageFiles(str(images), _names(file), labels[split]) for split, file in lists.items()}
    classes = [folders[number].partition("/")[2] for number in range(len(folders))]
    lines = (f"{split} {line}" for split, file in lists.items() for line in _lines(file))
    return Source("Places205", classes, {**splits}, {}, fingerprint(lines))


def _find_list(root: Path, name: str) -> Path:
    found = next((root / folder / name for folder in LIST_FOLDERS if (root / folder / name).is_file()), None)
    if found is None:
        raise ValueError(f"{root / LIST_FOLDERS[0] / name} is missing; extract trainvalsplit_places205.tar.gz there.")
    return found


def _lines(file: Path) -> Iterator[str]:
    """The lines that are not empty. There are millions, so they are read again each time they are needed.

    A byte order mark, and a slash or "./" before a path, as other lists of Places have, are dropped.
    """
    with file.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        yield from (stripped for line in lines if (stripped := line.strip().removeprefix(".").lstrip("/")))


def _names(file: Path) -> Iterator[str]:
    return (line.rpartition(" ")[0] for line in _lines(file))


def _labels(file: Path, folders: dict[int, str]) -> np.ndarray:
    """The labels in a list, int32 (N,). Adds the folder of each class to `folders`."""
    labels = array("i")
    for line in _lines(file):
        name, _, number = line.rpartition(" ")
        folder = name.rpartition("/")[0]
        if "/" not in folder or not number.isdecimal() or len(number) > 6:
            raise ValueError(f"{file} has the line {line!r}; a line must be like 'a/abbey/gsun_x.jpg 0'.")
        label = int(number)
        if folders.setdefault(label, folder) != folder:
            raise ValueError(
                f"{file} has class {label} in {folder}/ and in {folders[label]}/; a class must have one folder."
            )
        labels.append(label)
    if not labels:
        raise ValueError(f"{file} lists no images; extract trainvalsplit_places205.tar.gz again.")
    return np.array(labels, np.int32)


def _check_classes(folders: dict[int, str], train: np.ndarray, lists: dict[str, Path], images: Path) -> None:
    """Checks that the training list numbers the classes 0, 1, 2 ..., and that each has its own existing folder."""
    trained = np.unique(train)
    if len(trained) != trained[-1] + 1:
        gap = int(np.setdiff1d(np.arange(trained[-1]), trained)[0])
        raise ValueError(f"{lists['train']} has no image of class {gap}; its classes must be numbered without gaps.")
    unknown = sorted(set(folders) - set(trained.tolist()))
    if unknown:
        raise ValueError(
            f"{lists['test']} has class {unknown[0]}, which is not in the training list; extract "
            f"trainvalsplit_places205.tar.gz again."
        )
    numbers = {folder: number for number, folder in folders.items()}
    for number, folder in folders.items():
        if numbers[folder] != number:
            raise ValueError(
                f"{folder}/ is class {number} and class {numbers[folder]}; each class must have a folder of its own."
            )
        if not (images / folder).is_dir():
            raise ValueError(f"{images / folder} is missing; extract imagesPlaces205_resize.tar.gz again.")
