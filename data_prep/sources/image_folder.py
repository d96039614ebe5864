"""A folder of images: `train/<class>/*`, optionally `valid/<class>/*` and `test/<class>/*`."""

import os
from pathlib import Path
from typing import Literal

import numpy as np

from data_prep.config import SourceConfig
from data_prep.sources.base import ImageFiles, Images, Source, fingerprint

SPLITS = {"train": ("train",), "valid": ("valid", "val", "validation"), "test": ("test",)}
"""Split: the names of folders that are taken for it."""
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


def open_source(config: SourceConfig) -> Source:
    """Lists the images. Raises ValueError for a missing folder or split, no images, or an unknown class."""
    assert config.path is not None
    root = Path(config.path)
    if not root.is_dir():
        raise ValueError(f"source.path {root} is not a folder; it must be a folder with train/<class>/*.")
    folders = {split: _find(root, names) for split, names in SPLITS.items()}
    if folders["train"] is None:
        raise ValueError(f"source.path {root} has no folder train/; it must contain train/<class>/*.")
    classes = _subfolders(folders["train"])
    if not classes:
        raise ValueError(f"{folders['train']} has no class folders; images must be in train/<class>/.")
    splits: dict[str, Images] = {
        split: _list_split(folder, classes) for split, folder in folders.items() if folder is not None
    }
    names = (f"{split}/{name}" for split, found in splits.items() for name in found.names)  # type: ignore[attr-defined]
    return Source(root.resolve().name, classes, splits, {}, fingerprint(names))


def _find(root: Path, names: tuple[str, ...]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(
            entry.name for entry in entries if _entry_kind(entry) == "folder" and not entry.name.startswith(".")
        )


def _list_split(folder: Path, classes: list[str]) -> ImageFiles:
    names: list[str] = []
    labels: list[int] = []
    above = frozenset([folder.resolve(), *folder.resolve().parents])
    for name in _subfolders(folder):
        if name not in classes:
            raise ValueError(f"{folder / name} is a class that is not in train/; rename or remove it.")
        found = _images_below(folder, name, above)
        names += found
        labels += [classes.index(name)] * len(found)
    if not names:
        raise ValueError(f"{folder} has no images; they must be in <class>/ and end in .jpg, .png or the like.")
    return ImageFiles(str(folder), names, np.array(labels))


def _images_below(folder: Path, name: str, above: frozenset[Path]) -> list[str]:
    """Sorted paths of the images in `folder/name` and below, relative to `folder`.

    Links are followed, except into a folder that contains them (`above`). A broken link counts as an unreadable
    image; FIFOs, sockets and devices are ignored.
    """
    here = (folder / name).resolve()
    if here in above:
        return []
    found: list[str] = []
    with os.scandir(folder / name) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            kind = _entry_kind(entry)
            if kind == "folder":
                found += _images_below(folder, f"{name}/{entry.name}", above | {here})
            elif kind != "other" and os.path.splitext(entry.name)[1].lower() in SUFFIXES:  # noqa: PTH122
                found.append(f"{name}/{entry.name}")
    return sorted(found)


def _entry_kind(entry: os.DirEntry[str]) -> Literal["folder", "file", "broken link", "other"]:
    """The kind of an entry; for a link, the kind of its target."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        return "broken link" if entry.is_symlink() and not os.path.exists(entry.path) else "other"  # noqa: PTH110
    except OSError:  # a cycle of links
        return "broken link"
