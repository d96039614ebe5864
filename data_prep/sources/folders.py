"""What folders of images contain: the images, what is ignored and counted, and what shows that a copy or an
extraction is incomplete."""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from data_prep.images.decode import is_image

logger = logging.getLogger(__name__)

SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ico"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    *(".jp2", ".j2k", ".jpf", ".jpx", ".j2c", ".jpc", ".avif", ".avifs"),
}
"""Endings of the formats that are decoded. A file with another ending is an image if its first bytes are an image's."""
NOT_IMAGES = {".txt", ".json", ".xml", ".csv", ".yaml", ".yml", ".caption", ".npy", ".npz", ".mat", ".pt"}
"""Endings whose files are not opened: some sets have such a file for each image."""
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip", ".7z", ".rar")
SYSTEM_FOLDERS = {
    *("@eadir", "@tmp", "@recycle", "#recycle", "#snapshot", "__macosx", "lost+found", "$recycle.bin"),
    *("system volume information", "temporary items", "network trash folder", "__pycache__"),
}
"""Folders that operating systems, file servers and archivers add, in lower case. Those that begin with a dot too."""
MAX_LEVELS = 100
"""Folders within each other below a class."""
TRAIN_WORDS = ("train", "training")
SPLIT_WORDS = (*TRAIN_WORDS, "valid", "val", "validation", "dev", "test", "testing", "eval", "evaluation")
"""The words by which published sets name their splits, as the package datasets knows them."""
SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(SPLIT_WORDS)})(?![a-z])")
SHOWN = 3
"""Names that a message lists."""

Kind = Literal["folder", "file", "broken link", "other"]


@dataclass
class IgnoredEntries:
    """What is in the folders of a split and is not read."""

    folders: Counter[str] = field(default_factory=Counter)
    """Hidden and system folders, by name."""
    hidden: int = 0
    """Hidden files."""
    files: Counter[str] = field(default_factory=Counter)
    """Files that are not images, by ending."""
    first: str = ""
    """The first of these files."""

    def add_file(self, name: str) -> None:
        """Counts the file with this path below the split's folder."""
        if name.rpartition("/")[2].startswith("."):
            self.hidden += 1
            return
        self.first = self.first or name
        self.files[_ending(name) or "without ending"] += 1

    def __str__(self) -> str:
        """Such as "system folders: 1 (@eaDir); files that are not images: 3 (2 .txt, 1 .db), the first is a.txt"."""
        parts = []
        if self.folders:
            parts.append(f"system folders: {self.folders.total():,} ({listed(list(self.folders))})")
        if self.hidden:
            parts.append(f"hidden files: {self.hidden:,}")
        if self.files:
            endings = listed([f"{count:,} {ending}" for ending, count in self.files.most_common()])
            parts.append(f"files that are not images: {self.files.total():,} ({endings}), the first is {self.first}")
        return "; ".join(parts)

    def log(self, folder: Path) -> None:
        """Logs what was ignored in a split's folder, if anything was."""
        if str(self):
            logger.info(f"{folder}: ignored {self}")


def listed(names: list[str]) -> str:
    """The first few of some names."""
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"


def entries_of(folder: Path, ignored: IgnoredEntries) -> list[os.DirEntry[str]]:
    """The sorted entries of a folder, without hidden ones and system folders, which are counted."""
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    visible = []
    for entry in found:
        is_hidden = entry.name.startswith(".")
        if (is_hidden or entry.name.lower() in SYSTEM_FOLDERS) and entry_kind(entry) == "folder":
            ignored.folders[entry.name] += 1
        elif is_hidden:
            ignored.add_file(entry.name)
        else:
            visible.append(entry)
    return visible


def images_below(folder: Path, name: str, ignored: IgnoredEntries) -> list[str]:
    """Sorted paths of the images in `folder/name` and below, relative to `folder`.

    Each real folder is read once, at its own place rather than through a link; links are followed, except into a
    folder that contains `folder`. A broken link counts as an unreadable image; FIFOs, sockets and devices are ignored.
    Raises ValueError for more than MAX_LEVELS folders within each other.
    """
    top = folder.resolve()
    seen = {_identity(above) for above in (top, *top.parents)}
    found: list[str] = []
    folders, links = [name], list[str]()
    while folders or links:
        here = folders.pop() if folders else links.pop(0)
        if here.count("/") > MAX_LEVELS:
            raise ValueError(
                f"{folder / here[:80]}... has more than {MAX_LEVELS} folders within each other; move the images up."
            )
        identity = _identity(folder / here)
        if identity in seen:
            continue
        seen.add(identity)
        for entry in entries_of(folder / here, ignored):
            path, kind = f"{here}/{entry.name}", entry_kind(entry)
            if kind == "folder":
                (links if entry.is_symlink() else folders).append(path)
            elif _is_image(entry, kind):
                found.append(path)
            elif kind == "file":
                ignored.add_file(path)
    return sorted(found)


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def loose_images(entries: list[os.DirEntry[str]], ignored: IgnoredEntries) -> list[str]:
    """The names of the images among the entries of a split's folder; other files are counted."""
    images = []
    for entry in entries:
        kind = entry_kind(entry)
        if _is_image(entry, kind):
            images.append(entry.name)
        elif kind == "file":
            ignored.add_file(entry.name)
    return images


def refuse_loose_images(folder: Path, images: list[str]) -> None:
    """Raises ValueError for images beside class folders: they have no class, or the sorting was interrupted."""
    if images:
        raise ValueError(
            f"{folder} has images outside its class folders: {len(images):,} ({listed(images)}); move each into the "
            f"folder of its class, or remove them."
        )


def unextracted(folder: Path) -> Iterator[tuple[str, str]]:
    """(archive, the folder that it would be extracted to) of each archive whose folder is missing."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries)
    for name in names:
        ending = max((ending for ending in ARCHIVES if name.lower().endswith(ending)), key=len, default="")
        stem = name[: len(name) - len(ending)]
        is_class = stem and not name.startswith(".") and stem.lower() != folder.name.lower()
        if ending and is_class and not (folder / stem).is_dir():
            yield name, stem


def refuse_unextracted(folder: Path) -> None:
    """Raises ValueError for an archive in a split's folder that its class may still be in."""
    archives = list(unextracted(folder))
    if archives:
        names = listed([name for name, _ in archives])
        raise ValueError(
            f"{folder} has archives that are not extracted: {len(archives):,} ({names}); extract each into the folder "
            f"of its class, such as {archives[0][1]}/, or remove them."
        )


def in_system_folder(name: str) -> bool:
    """Whether a path in an archive leads through a system folder."""
    return not SYSTEM_FOLDERS.isdisjoint(name.lower().split("/")[:-1])


def has_image_ending(name: str) -> bool:
    return _ending(name) in SUFFIXES


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122  (a Path costs more, and there may be millions)


def _is_image(entry: os.DirEntry[str], kind: Kind) -> bool:
    """Whether a file, or a broken link, is to be read as an image."""
    ending = _ending(entry.name)
    if ending in SUFFIXES:
        return kind in ("file", "broken link")
    if ending in NOT_IMAGES or kind != "file":
        return False
    try:
        with open(entry.path, "rb", buffering=0) as file:  # noqa: PTH123
            return is_image(file.read(16))
    except OSError:
        return False


def entry_kind(entry: os.DirEntry[str]) -> Kind:
    """The kind of an entry; for a link, the kind of its target."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        return "broken link" if entry.is_symlink() and not os.path.exists(entry.path) else "other"  # noqa: PTH110
    except OSError:  # a cycle of links
        return "broken link"
