"""A folder of images: `train/<class>/*`, optionally `valid/<class>/*` and `test/<class>/*`."""

import logging
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np

from data_prep.config import SourceConfig
from data_prep.sources.base import ImageFiles, Images, Source, fingerprint
from data_prep.sources.folders import (
    SPLIT_WORD,
    IgnoredEntries,
    entries_of,
    entry_kind,
    images_below,
    listed,
    loose_images,
    refuse_loose_images,
    refuse_unextracted,
    unextracted,
)

logger = logging.getLogger(__name__)

SPLITS = {"train": ("train",), "valid": ("valid", "val", "validation"), "test": ("test",)}
"""Split: the names of folders that are taken for it."""


def open_source(config: SourceConfig) -> Source:
    """Lists the images.

    Raises ValueError for a missing or ambiguous folder or split, no images, images without a class, archives that are
    not extracted, or an unknown class.
    """
    assert config.path is not None
    root = Path(config.path)
    if not root.is_dir():
        raise ValueError(f"source.path {root} is not a folder; it must be a folder with train/<class>/*.")
    folders = {split: _find(root, split) for split in SPLITS}
    _check_others(root)
    if folders["train"] is None:
        raise ValueError(f"source.path {root} has no folder train/; it must contain train/<class>/*.")
    classes = _class_folders(folders["train"], IgnoredEntries())
    spellings = Counter(map(str.lower, classes))
    if same := [name for name in classes if spellings[name.lower()] > 1]:
        logger.warning(f"{folders['train']} has classes that differ in capitals alone: {listed(same)}")
    if not classes:
        raise ValueError(f"{folders['train']} has no class folders; images must be in train/<class>/.")
    splits: dict[str, Images] = {
        split: _list_split(folder, classes) for split, folder in folders.items() if folder is not None
    }
    names = (f"{split}/{name}" for split, found in splits.items() for name in found.names)  # type: ignore[attr-defined]
    return Source(root.resolve().name, classes, splits, {}, fingerprint(names))


def _find(root: Path, split: str) -> Path | None:
    """The folder of a split, in any case. Raises ValueError if there are two, or only an archive of it."""
    found = sorted(path for path in root.iterdir() if path.name.lower() in SPLITS[split] and path.is_dir())
    if len(found) > 1:
        names = " and ".join(f"{path.name}/" for path in found)
        raise ValueError(f"source.path {root} has {names} for the split {split}; rename or remove all but one.")
    archives = [archive for archive, folder in unextracted(root) if folder.lower() in SPLITS[split]]
    if archives and not found:
        raise ValueError(f"source.path {root} has {archives[0]}, but no folder {split}/; extract it, or remove it.")
    return found[0] if found else None


def _check_others(root: Path) -> None:
    """Raises ValueError for a folder that is named like a split and not read; logs what else is beside the splits."""
    ignored = IgnoredEntries()
    entries = entries_of(root, ignored)
    read = {*chain.from_iterable(SPLITS.values())}
    others = [entry.name for entry in entries if entry_kind(entry) == "folder" and entry.name.lower() not in read]
    for name in others:
        if SPLIT_WORD.search(name.lower()):
            raise ValueError(
                f"source.path {root} has {name}/, which is not the name of a split; rename it to train/, valid/ or "
                f"test/, or move it away."
            )
    others = [f"{name}/" for name in others] + loose_images(entries, ignored)
    if others:
        logger.warning(f"{root}: ignored beside the folders of the splits: {listed(others)}")


def _class_folders(folder: Path, ignored: IgnoredEntries) -> list[str]:
    return [entry.name for entry in entries_of(folder, ignored) if entry_kind(entry) == "folder"]


def _list_split(folder: Path, classes: list[str]) -> ImageFiles:
    ignored = IgnoredEntries()
    names: list[str] = []
    labels: list[int] = []
    empty: list[str] = []
    entries = entries_of(folder, ignored)
    refuse_unextracted(folder)
    refuse_loose_images(folder, loose_images(entries, ignored))
    for name in (entry.name for entry in entries if entry_kind(entry) == "folder"):
        if name not in classes:
            raise ValueError(f"{folder / name} is a class that is not in train/; rename or remove it.")
        found = images_below(folder, name, ignored)
        names += found
        labels += [classes.index(name)] * len(found)
        empty += [] if found else [name]
    if not names:
        found_instead = f"; ignored {ignored}" if str(ignored) else ""
        raise ValueError(
            f"{folder} has no images; they must be in <class>/ and end in .jpg, .png or the like{found_instead}."
        )
    ignored.log(folder)
    if empty:
        logger.warning(
            f"{folder} has no images in {len(empty):,} of its class folders, which are classes all the same: "
            f"{listed(empty)}"
        )
    missing = sorted(set(classes) - {classes[label] for label in set(labels)} - set(empty))
    if missing:
        logger.warning(f"{folder} has no folder for {len(missing):,} of train's classes: {listed(missing)}")
    return ImageFiles(str(folder), names, np.array(labels))
