"""ImageNet's ILSVRC2012 (Russakovsky et al. 2014): the official archives, extracted or not, and Kaggle's copy.

    PATH/train/n01440764/*.JPEG ...                or  PATH/ILSVRC2012_img_train.tar, which contains n01440764.tar ...
    PATH/val/ILSVRC2012_val_00000001.JPEG ...      or  PATH/ILSVRC2012_img_val.tar  or  PATH/val/n01440764/*.JPEG ...
    PATH/ILSVRC2012_devkit_t12/data/               or  PATH/ILSVRC2012_devkit_t12.tar.gz
    PATH/ILSVRC/Data/CLS-LOC/{train,val}/, PATH/LOC_val_solution.csv, PATH/LOC_synset_mapping.txt    (Kaggle)

A label is the rank of the WordNet id in sorted order, as is common; the devkit's own numbers differ. The official
validation set becomes the split `test`: the official test images were published without classes. Tars are read
without extracting them, and have the same images in the same order as the folders.
"""

import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np

from data_prep.config import SourceConfig
from data_prep.sources.base import ImageFiles, Names, Source, fingerprint
from data_prep.sources.folders import (
    IgnoredEntries,
    entry_kind,
    has_image_ending,
    in_system_folder,
    listed,
    refuse_loose_images,
)
from data_prep.sources.imagenet_classes import Classes, read_classes
from data_prep.sources.tar_index import Member, RandomAccessFile, TarImages, open_random_access, tar_members

KAGGLE_IMAGES = "ILSVRC/Data/CLS-LOC"
TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
WNID = re.compile(r"n\d{8}")
INDEX_THREADS = 16
"""Threads that read the headers of the class tars: on a network file system, each of a million reads has latency."""

TarListing = tuple[Names, np.ndarray, np.ndarray]
"""A tar's images: base names, offsets and sizes int64 (N,)."""


def open_source(config: SourceConfig) -> Source:
    """Lists the images. Raises ValueError naming the folder, archive or ground truth that is missing or invalid."""
    assert config.path is not None
    root = Path(config.path)
    if not root.is_dir():
        raise ValueError(f"source.path {root} is not a folder; it must be a folder with train/ or {TRAIN_TAR}.")
    parent = root / KAGGLE_IMAGES if (root / KAGGLE_IMAGES).is_dir() else root
    classes = read_classes(root)
    train, wnids = _open_train(parent)
    names = classes.names(wnids)
    splits = {"train": train}
    test = _open_val(parent, root, wnids, classes)
    if test is not None:
        splits["test"] = test
    parts = (
        f"{split}/{name} {label}"
        for split, found in splits.items()
        for name, label in zip(found.names, found.labels, strict=True)
    )
    facts = {"wnids": wnids, "labels": "the rank of the WordNet id in sorted order"}
    return Source("ImageNet", names, {**splits}, {}, fingerprint(parts), facts=facts)


def _open_train(parent: Path) -> tuple[ImageFiles | TarImages, list[str]]:
    """The training images, and the sorted WordNet ids of their classes."""
    if (parent / "train").is_dir():
        wnids = _class_folders(parent / "train")
        if not wnids:
            raise ValueError(
                f"{parent / 'train'} has no folders named by WordNet ids; it must contain n01440764/*.JPEG and so on."
            )
        train = _in_class_folders(parent / "train", wnids)
        _refuse_unextracted(parent / "train")
        return train, wnids
    if not (parent / TRAIN_TAR).is_file():
        raise ValueError(f"source.path {parent} has neither the folder train/ nor {TRAIN_TAR}; add one of them.")
    file = open_random_access(parent / TRAIN_TAR)
    named = ((PurePosixPath(member.name), member) for member in tar_members(file))
    tars = {path.stem: member for path, member in named if path.suffix == ".tar" and WNID.fullmatch(path.stem)}
    if not tars:
        raise ValueError(f"{file.name} has no class archives such as n01440764.tar; download it again.")
    wnids = sorted(tars)
    with ThreadPoolExecutor(INDEX_THREADS) as pool:
        listings = list(pool.map(lambda wnid: _list_tar(file, tars[wnid]), wnids))
    for wnid, (names, _, _) in zip(wnids, listings, strict=True):
        if not len(names):
            raise ValueError(f"{file.name}/{wnid}.tar has no images; download it again.")
    offsets, sizes = (np.concatenate([one[column] for one in listings]) for column in (1, 2))
    names_by_class = [names for names, _, _ in listings]
    return TarImages(file, _below(wnids, names_by_class), offsets, sizes, _ranks(names_by_class)), wnids


def _open_val(parent: Path, root: Path, wnids: list[str], classes: Classes) -> ImageFiles | TarImages | None:
    """The validation images; None if there are none."""
    folder = parent / "val"
    if folder.is_dir():
        found = _class_folders(folder)
        if found:
            _refuse_unknown(found, wnids, folder)
            return _in_class_folders(folder, wnids)
        ignored = IgnoredEntries()
        flat = _images_in(folder, ignored)
        ignored.log(folder)
        return ImageFiles(str(folder), flat, _flat_labels(flat, wnids, classes, folder, root))
    if not (parent / VAL_TAR).is_file():
        return None
    file = open_random_access(parent / VAL_TAR)
    names, offsets, sizes = _list_tar(file)
    return TarImages(file, names, offsets, sizes, _flat_labels(list(names), wnids, classes, Path(file.name), root))


def _flat_labels(names: list[str], wnids: list[str], classes: Classes, parent: Path, root: Path) -> np.ndarray:
    """Labels (N,) of images without class folders, in the order of their names."""
    if not names:
        raise ValueError(f"{parent} has no images; extract or download {VAL_TAR} again.")
    true_wnids = classes.of_images(names, parent, root)
    _refuse_unknown(set(true_wnids), wnids, parent)
    rank = {wnid: label for label, wnid in enumerate(wnids)}
    return np.array([rank[wnid] for wnid in true_wnids])


def _refuse_unknown(found: Iterable[str], wnids: list[str], parent: Path) -> None:
    unknown = sorted(set(found) - set(wnids))
    if unknown:
        raise ValueError(
            f"{parent} has images of {unknown[0]}, a class that the training set does not have; add it to that set."
        )


def _class_folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if WNID.fullmatch(entry.name) and entry.is_dir())


def _in_class_folders(folder: Path, wnids: list[str]) -> ImageFiles:
    """The images of folder/<wnid>/, class by class."""
    names_by_class = []
    ignored = IgnoredEntries()
    refuse_loose_images(folder, _images_in(folder, ignored))
    for wnid in wnids:
        names = _images_in(folder / wnid, ignored, f"{wnid}/") if (folder / wnid).is_dir() else []
        if not names:
            raise ValueError(f"{folder / wnid} has no images; extract or copy that class again.")
        names_by_class.append(Names(names))
    ignored.log(folder)
    return ImageFiles(str(folder), _below(wnids, names_by_class), _ranks(names_by_class))


def _refuse_unextracted(folder: Path) -> None:
    """Raises ValueError for a class archive beside the class folders that has images that were not extracted."""
    tars = sorted(path for path in folder.glob("n*.tar") if WNID.fullmatch(path.stem))
    with ThreadPoolExecutor(INDEX_THREADS) as pool:
        for tar, (images, missing) in zip(tars, pool.map(_not_extracted, tars), strict=True):
            if missing:
                raise ValueError(
                    f"{folder} has the class archive {tar.name}, and {len(missing):,} of its {images:,} images are not "
                    f"in {tar.stem}/ ({listed(missing)}); extract it there, then remove it."
                )


def _not_extracted(tar: Path) -> tuple[int, list[str]]:
    """The number of images in a class archive, and the names of those that are not in its folder."""
    names, _, _ = _list_tar(open_random_access(tar))
    folder = tar.with_suffix("")
    extracted = set(os.listdir(folder)) if folder.is_dir() else set()  # noqa: PTH208  (names only)
    return len(names), [name for name in names if name not in extracted]


def _below(wnids: list[str], names_by_class: list[Names]) -> Iterator[str]:
    for wnid, names in zip(wnids, names_by_class, strict=True):
        yield from (f"{wnid}/{name}" for name in names)


def _ranks(names_by_class: list[Names]) -> np.ndarray:
    return np.repeat(np.arange(len(names_by_class)), [len(names) for names in names_by_class])


def _images_in(folder: Path, ignored: IgnoredEntries, below: str = "") -> list[str]:
    """The sorted names of a folder's images. Other files are counted, with their paths `below` the split's folder."""
    images = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_image(entry.name):
                images.append(entry.name)
            elif entry_kind(entry) == "file":
                ignored.add_file(f"{below}{entry.name}")
    return sorted(images)


def _list_tar(file: RandomAccessFile, inside: Member | None = None) -> TarListing:
    """The images of a tar, sorted by name, as in a listing of its extracted folder."""
    found = (member for member in tar_members(file, inside) if not in_system_folder(member.name))
    members = {PurePosixPath(member.name).name: member for member in found}
    names = sorted(name for name in members if _is_image(name))
    offsets = np.array([members[name].offset for name in names], np.int64)
    return Names(names), offsets, np.array([members[name].size for name in names], np.int64)


def _is_image(name: str) -> bool:
    return has_image_ending(name) and not name.startswith(".")
