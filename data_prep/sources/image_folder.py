"""A folder of pictures: `train/<class>/*`, optionally `valid/<class>/*` and `test/<class>/*`."""

import os
from pathlib import Path
from typing import Literal

import numpy as np

from data_prep.config import SourceConfig
from data_prep.sources.base import ImageFiles, Images, Source, fingerprint

SPLITS = {"train": ("train",), "valid": ("valid", "val", "validation"), "test": ("test",)}
"""Our name of a split: the folder's names it is found under."""
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


def open_source(config: SourceConfig) -> Source:
    """Lists the pictures. Raises ValueError for a missing folder or split, no pictures, or an unknown class."""
    assert config.path is not None
    root = Path(config.path)
    if not root.is_dir():
        raise ValueError(f"source.path {root} is no folder; it must be one that holds train/<class>/*.")
    folders = {split: _find(root, names) for split, names in SPLITS.items()}
    if folders["train"] is None:
        raise ValueError(f"source.path {root} holds no folder train/; it must hold train/<class>/*.")
    classes = _subfolders(folders["train"])
    if not classes:
        raise ValueError(f"{folders['train']} holds no class folders; pictures must lie in train/<class>/.")
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
            entry.name for entry in entries if _leads_to(entry) == "folder" and not entry.name.startswith(".")
        )


def _list_split(folder: Path, classes: list[str]) -> ImageFiles:
    names: list[str] = []
    labels: list[int] = []
    above = frozenset([folder.resolve(), *folder.resolve().parents])
    for name in _subfolders(folder):
        if name not in classes:
            raise ValueError(f"{folder / name} is a class that train/ does not have; rename or remove it.")
        found = _pictures_below(folder, name, above)
        names += found
        labels += [classes.index(name)] * len(found)
    if not names:
        raise ValueError(f"{folder} holds no pictures; they must lie in <class>/ and end in .jpg, .png or the like.")
    return ImageFiles(str(folder), names, np.array(labels))


def _pictures_below(folder: Path, name: str, above: frozenset[Path]) -> list[str]:
    """Sorted paths of the pictures in `folder/name` and below, relative to `folder`.

    Links are followed, but not back into a folder they lie in (`above`). A link that leads nowhere counts as a
    picture, one that can't be read; FIFOs, sockets and devices don't.
    """
    here = (folder / name).resolve()
    if here in above:
        return []
    found: list[str] = []
    with os.scandir(folder / name) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            kind = _leads_to(entry)
            if kind == "folder":
                found += _pictures_below(folder, f"{name}/{entry.name}", above | {here})
            elif kind != "other" and os.path.splitext(entry.name)[1].lower() in SUFFIXES:  # noqa: PTH122
                found.append(f"{name}/{entry.name}")
    return sorted(found)


def _leads_to(entry: os.DirEntry[str]) -> Literal["folder", "file", "nowhere", "other"]:
    """What an entry is; a link, what is at its end."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        return "nowhere" if entry.is_symlink() and not os.path.exists(entry.path) else "other"  # noqa: PTH110
    except OSError:  # links in a circle
        return "nowhere"
