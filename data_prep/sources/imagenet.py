"""ImageNet's ILSVRC2012 (Russakovsky et al. 2014): the official archives, extracted or not, and Kaggle's copy.

    PATH/train/n01440764/*.JPEG ...                or  PATH/ILSVRC2012_img_train.tar, which holds n01440764.tar ...
    PATH/val/ILSVRC2012_val_00000001.JPEG ...      or  PATH/ILSVRC2012_img_val.tar  or  PATH/val/n01440764/*.JPEG ...
    PATH/ILSVRC2012_devkit_t12/data/               or  PATH/ILSVRC2012_devkit_t12.tar.gz
    PATH/ILSVRC/Data/CLS-LOC/{train,val}/, PATH/LOC_val_solution.csv, PATH/LOC_synset_mapping.txt    (Kaggle)

A label is the rank of its WordNet id in sorted order, as in the field; the devkit numbers its classes otherwise.
The official validation set is our split `test`: the test pictures were published without classes. The tars are
read where they lie, and give the same pictures in the same order as the folders.
"""

import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np

from data_prep.config import SourceConfig
from data_prep.sources.base import ImageFiles, Names, Source, fingerprint
from data_prep.sources.imagenet_classes import Classes, read_classes
from data_prep.sources.tar_index import Member, PlacedFile, TarImages, open_placed, tar_members

KAGGLE_PICTURES = "ILSVRC/Data/CLS-LOC"
TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
WNID = re.compile(r"n\d{8}")
SUFFIX = ".jpeg"
INDEX_THREADS = 16
"""Threads that read the headers of the class tars: on a network file system each of a million waits its turn."""

Listed = tuple[Names, np.ndarray, np.ndarray]
"""A tar's pictures: base names, offsets and sizes int64 (N,)."""


def open_source(config: SourceConfig) -> Source:
    """Lists the pictures. Raises ValueError naming the folder, archive or truth file that is missing or wrong."""
    assert config.path is not None
    root = Path(config.path)
    if not root.is_dir():
        raise ValueError(f"source.path {root} is no folder; it must be one that holds train/ or {TRAIN_TAR}.")
    place = root / KAGGLE_PICTURES if (root / KAGGLE_PICTURES).is_dir() else root
    classes = read_classes(root)
    train, wnids = _open_train(place)
    names = classes.names(wnids)
    splits = {"train": train}
    test = _open_val(place, root, wnids, classes)
    if test is not None:
        splits["test"] = test
    parts = (
        f"{split}/{name} {label}"
        for split, found in splits.items()
        for name, label in zip(found.names, found.labels, strict=True)
    )
    facts = {"wnids": wnids, "labels": "the rank of the WordNet id in sorted order"}
    return Source("ImageNet", names, {**splits}, {}, fingerprint(parts), facts=facts)


def _open_train(place: Path) -> tuple[ImageFiles | TarImages, list[str]]:
    """The pictures, and the sorted WordNet ids of their classes."""
    if (place / "train").is_dir():
        wnids = _class_folders(place / "train")
        if not wnids:
            raise ValueError(
                f"{place / 'train'} holds no folders named by WordNet ids; it must hold n01440764/*.JPEG and so on."
            )
        return _in_class_folders(place / "train", wnids), wnids
    if not (place / TRAIN_TAR).is_file():
        raise ValueError(f"source.path {place} holds neither the folder train/ nor {TRAIN_TAR}; put one there.")
    file = open_placed(place / TRAIN_TAR)
    named = ((PurePosixPath(member.name), member) for member in tar_members(file))
    tars = {path.stem: member for path, member in named if path.suffix == ".tar" and WNID.fullmatch(path.stem)}
    if not tars:
        raise ValueError(f"{file.name} holds no class archives such as n01440764.tar; fetch it again.")
    wnids = sorted(tars)
    with ThreadPoolExecutor(INDEX_THREADS) as pool:
        listed = list(pool.map(lambda wnid: _list_tar(file, tars[wnid]), wnids))
    for wnid, (names, _, _) in zip(wnids, listed, strict=True):
        if not len(names):
            raise ValueError(f"{file.name}/{wnid}.tar holds no .JPEG pictures; fetch it again.")
    offsets, sizes = (np.concatenate([one[column] for one in listed]) for column in (1, 2))
    names_by_class = [names for names, _, _ in listed]
    return TarImages(file, _below(wnids, names_by_class), offsets, sizes, _ranks(names_by_class)), wnids


def _open_val(place: Path, root: Path, wnids: list[str], classes: Classes) -> ImageFiles | TarImages | None:
    """The validation pictures, where there are any."""
    folder = place / "val"
    if folder.is_dir():
        found = _class_folders(folder)
        if found:
            _refuse_unknown(found, wnids, folder)
            return _in_class_folders(folder, wnids)
        flat = _pictures_in(folder)
        return ImageFiles(str(folder), flat, _flat_labels(flat, wnids, classes, folder, root))
    if not (place / VAL_TAR).is_file():
        return None
    file = open_placed(place / VAL_TAR)
    names, offsets, sizes = _list_tar(file)
    return TarImages(file, names, offsets, sizes, _flat_labels(list(names), wnids, classes, Path(file.name), root))


def _flat_labels(names: list[str], wnids: list[str], classes: Classes, place: Path, root: Path) -> np.ndarray:
    """Labels (N,) of pictures that lie all in one place, in the order of their names."""
    if not names:
        raise ValueError(f"{place} holds no .JPEG pictures; extract or fetch {VAL_TAR} again.")
    true_wnids = classes.of_pictures(names, place, root)
    _refuse_unknown(set(true_wnids), wnids, place)
    rank = {wnid: label for label, wnid in enumerate(wnids)}
    return np.array([rank[wnid] for wnid in true_wnids])


def _refuse_unknown(found: Iterable[str], wnids: list[str], place: Path) -> None:
    unknown = sorted(set(found) - set(wnids))
    if unknown:
        raise ValueError(f"{place} has pictures of {unknown[0]}, a class that the training set lacks; complete that.")


def _class_folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if WNID.fullmatch(entry.name) and entry.is_dir())


def _in_class_folders(folder: Path, wnids: list[str]) -> ImageFiles:
    """The pictures of folder/<wnid>/, class after class."""
    names_by_class = []
    for wnid in wnids:
        names = _pictures_in(folder / wnid) if (folder / wnid).is_dir() else []
        if not names:
            raise ValueError(f"{folder / wnid} holds no .JPEG pictures; extract or copy that class again.")
        names_by_class.append(Names(names))
    return ImageFiles(str(folder), _below(wnids, names_by_class), _ranks(names_by_class))


def _below(wnids: list[str], names_by_class: list[Names]) -> Iterator[str]:
    for wnid, names in zip(wnids, names_by_class, strict=True):
        yield from (f"{wnid}/{name}" for name in names)


def _ranks(names_by_class: list[Names]) -> np.ndarray:
    return np.repeat(np.arange(len(names_by_class)), [len(names) for names in names_by_class])


def _pictures_in(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if _is_picture(entry.name))


def _list_tar(file: PlacedFile, inside: Member | None = None) -> Listed:
    """The pictures of a tar, sorted by name, as a listing of its extracted folder would be."""
    places = {PurePosixPath(member.name).name: member for member in tar_members(file, inside)}
    names = sorted(name for name in places if _is_picture(name))
    offsets = np.array([places[name].offset for name in names], np.int64)
    return Names(names), offsets, np.array([places[name].size for name in names], np.int64)


def _is_picture(name: str) -> bool:
    return name.lower().endswith(SUFFIX) and not name.startswith(".")
