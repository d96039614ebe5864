"""STL-10 as published in its binary version, from the extracted folder or the archive.

https://cs.stanford.edu/~acoates/stl10 describes the layout: a picture is 3 planes of 96x96 bytes, each stored
column after column; labels count from 1.
"""

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from shutil import copyfileobj
from tempfile import TemporaryFile, gettempdir
from typing import IO

import numpy as np

from data_prep.common.files import DISK_FULL
from data_prep.config import SourceConfig
from data_prep.images.decode import BadImage, Decode
from data_prep.sources.base import UNLABELLED, Images, Source, fingerprint, opened_archive
from data_prep.sources.tar_index import PlacedFile, open_placed

SIDE = 96
PICTURE_BYTES = 3 * SIDE * SIDE
LABELLED = {"train": ("train_X.bin", "train_y.bin"), "test": ("test_X.bin", "test_y.bin")}
UNLABELLED_FILE = "unlabeled_X.bin"
NAMES_FILE = "class_names.txt"
COPY_BYTES = 1 << 20


class PlaneImages(Images):
    """The pictures of one or more _X.bin files, one file after the other."""

    def __init__(self, files: Sequence[PlacedFile], labels: np.ndarray) -> None:
        """labels: integers (N,), for all files together."""
        self.files, self.labels = files, labels.astype(np.int32)
        self._starts = np.cumsum([0, *(file.size // PICTURE_BYTES for file in files)])
        assert self._starts[-1] == len(labels)

    def image(self, index: int, decode: Decode) -> np.ndarray:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        file, place = self.files[number], int(index - self._starts[number])
        content = file.read(place * PICTURE_BYTES, PICTURE_BYTES)
        if len(content) < PICTURE_BYTES:
            raise BadImage(f"{file.name}, picture {place}", "unreadable", "the file became shorter")
        columns = np.frombuffer(content, np.uint8).reshape(3, SIDE, SIDE)  # colour, x, y
        return np.ascontiguousarray(columns.transpose(2, 1, 0))


def open_source(config: SourceConfig) -> Source:
    """Reads the labels; pictures stay in their files. Raises ValueError naming what is missing or damaged."""
    assert config.path is not None
    path = Path(config.path)
    wanted = [NAMES_FILE, *LABELLED["train"], *LABELLED["test"], *([UNLABELLED_FILE] if config.unlabelled else [])]
    files = _open_files(path, wanted)
    missing = ", ".join(name for name in wanted if name not in files)
    if missing:
        raise ValueError(f"source.path {path} lacks {missing}; it must be stl10_binary.tar.gz or its folder.")
    classes = files[NAMES_FILE].read(0, files[NAMES_FILE].size).decode("utf-8", "replace").split()
    if not classes:
        raise ValueError(f"{files[NAMES_FILE].name} names no classes; fetch it again.")
    pictures = {split: [files[name]] for split, (name, _) in LABELLED.items()}
    labels = {split: _labels(files[name], _count(files[x]), classes) for split, (x, name) in LABELLED.items()}
    if config.unlabelled:
        unlabelled = files[UNLABELLED_FILE]
        pictures["train"].append(unlabelled)
        labels["train"] = np.concatenate([labels["train"], np.full(_count(unlabelled), UNLABELLED)])
    splits: dict[str, Images] = {split: PlaneImages(pictures[split], labels[split]) for split in LABELLED}
    sizes = (f"{name} {files[name].size}" for name in wanted)
    return Source("STL-10", classes, splits, {}, fingerprint(sizes))


def _open_files(path: Path, wanted: Sequence[str]) -> dict[str, PlacedFile]:
    if path.is_file():
        return _unpacked(path, wanted)
    if not path.is_dir():
        raise ValueError(f"source.path {path} does not exist; it must be stl10_binary.tar.gz or its folder.")
    folder = path / "stl10_binary" if (path / "stl10_binary").is_dir() else path
    return {name: open_placed(folder / name) for name in wanted if (folder / name).is_file()}


def _unpacked(archive: Path, wanted: Sequence[str]) -> dict[str, PlacedFile]:
    """The wanted files of the archive, each in a temporary file that vanishes when it is closed."""
    files: dict[str, PlacedFile] = {}
    with opened_archive(archive, f"source.path {archive}") as tar:
        for member in tar:
            name = PurePosixPath(member.name).name
            content = tar.extractfile(member) if name in wanted else None
            if content is not None:
                files[name] = PlacedFile(f"{archive}/{name}", _unpacked_file(content, archive))
            if len(files) == len(wanted):  # the rest of the archive, such as the unlabelled part, is not unpacked
                break
    return files


def _unpacked_file(content: IO[bytes], archive: Path) -> int:
    """The descriptor of a temporary file with this content."""
    try:
        with TemporaryFile() as temporary:
            copyfileobj(content, temporary, COPY_BYTES)
            temporary.flush()
            return os.dup(temporary.fileno())
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise ValueError(
            f"source.path {archive} does not fit unpacked into {gettempdir()}; name its extracted folder, "
            "or set TMPDIR to a folder with more room."
        ) from error


def _count(file: PlacedFile) -> int:
    if not file.size or file.size % PICTURE_BYTES:
        raise ValueError(f"{file.name} has {file.size} bytes, no multiple of {PICTURE_BYTES}; fetch it again.")
    return file.size // PICTURE_BYTES


def _labels(file: PlacedFile, pictures: int, classes: list[str]) -> np.ndarray:
    """int64 (N,), from 0."""
    labels = np.frombuffer(file.read(0, file.size), np.uint8).astype(np.int64) - 1
    if len(labels) != pictures:
        raise ValueError(f"{file.name} has {len(labels)} labels for {pictures} pictures; fetch it again.")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(f"{file.name} has a label outside 1 to {len(classes)}; fetch it again.")
    return labels
