"""STL-10 as published in its binary version, from the extracted folder or the archive.

https://cs.stanford.edu/~acoates/stl10 describes the layout: an image is 3 planes of 96x96 bytes, each stored in
column-major order; labels start at 1.
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
from data_prep.sources.base import UNLABELLED, Images, Source, fingerprint, open_archive
from data_prep.sources.tar_index import RandomAccessFile, open_random_access

SIDE = 96
IMAGE_BYTES = 3 * SIDE * SIDE
LABELLED = {"train": ("train_X.bin", "train_y.bin"), "test": ("test_X.bin", "test_y.bin")}
UNLABELLED_FILE = "unlabeled_X.bin"
NAMES_FILE = "class_names.txt"
COPY_BYTES = 1 << 20


class PlaneImages(Images):
    """The images of one or more _X.bin files, one file after the other."""

    def __init__(self, files: Sequence[RandomAccessFile], labels: np.ndarray) -> None:
        """labels: integers (N,), for the images of all files."""
        self.files, self.labels = files, labels.astype(np.int32)
        self._starts = np.cumsum([0, *(file.size // IMAGE_BYTES for file in files)])
        assert self._starts[-1] == len(labels)

    def image(self, index: int, decode: Decode) -> np.ndarray:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        file, position = self.files[number], int(index - self._starts[number])
        content = file.read(position * IMAGE_BYTES, IMAGE_BYTES)
        if len(content) < IMAGE_BYTES:
            raise BadImage(f"{file.name}, image {position}", "unreadable", "the file became shorter")
        columns = np.frombuffer(content, np.uint8).reshape(3, SIDE, SIDE)  # channel, x, y
        return np.ascontiguousarray(columns.transpose(2, 1, 0))


def open_source(config: SourceConfig) -> Source:
    """Reads the labels; images are read on demand. Raises ValueError naming the file that is missing or damaged."""
    assert config.path is not None
    path = Path(config.path)
    wanted = [NAMES_FILE, *LABELLED["train"], *LABELLED["test"], *([UNLABELLED_FILE] if config.unlabelled else [])]
    files = _open_files(path, wanted)
    missing = ", ".join(name for name in wanted if name not in files)
    if missing:
        raise ValueError(f"source.path {path} has no {missing}; it must be stl10_binary.tar.gz or its folder.")
    classes = files[NAMES_FILE].read(0, files[NAMES_FILE].size).decode("utf-8-sig", "replace").split()
    if not classes:
        raise ValueError(f"{files[NAMES_FILE].name} has no class names; download it again.")
    image_files = {split: [files[name]] for split, (name, _) in LABELLED.items()}
    labels = {split: _labels(files[name], _count(files[x]), classes) for split, (x, name) in LABELLED.items()}
    if config.unlabelled:
        unlabelled = files[UNLABELLED_FILE]
        image_files["train"].append(unlabelled)
        labels["train"] = np.concatenate([labels["train"], np.full(_count(unlabelled), UNLABELLED)])
    splits: dict[str, Images] = {split: PlaneImages(image_files[split], labels[split]) for split in LABELLED}
    sizes = (f"{name} {files[name].size}" for name in wanted)
    return Source("STL-10", classes, splits, {}, fingerprint(sizes))


def _open_files(path: Path, wanted: Sequence[str]) -> dict[str, RandomAccessFile]:
    if path.is_file():
        return _unpacked(path, wanted)
    if not path.is_dir():
        raise ValueError(f"source.path {path} does not exist; it must be stl10_binary.tar.gz or its folder.")
    folder = path / "stl10_binary" if (path / "stl10_binary").is_dir() else path
    return {name: open_random_access(folder / name) for name in wanted if (folder / name).is_file()}


def _unpacked(archive: Path, wanted: Sequence[str]) -> dict[str, RandomAccessFile]:
    """The wanted files of the archive, each extracted to a temporary file that is deleted when it is closed."""
    files: dict[str, RandomAccessFile] = {}
    with open_archive(archive, f"source.path {archive}") as tar:
        for member in tar:
            name = PurePosixPath(member.name).name
            content = tar.extractfile(member) if name in wanted else None
            if content is not None:
                files[name] = RandomAccessFile(f"{archive}/{name}", _unpacked_file(content, archive))
            if len(files) == len(wanted):  # the rest of the archive, such as the unlabelled images, is not extracted
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
            f"source.path {archive} does not fit into {gettempdir()} when extracted; extract it and set source.path to "
            f"its folder, or set TMPDIR to a folder with more space."
        ) from error


def _count(file: RandomAccessFile) -> int:
    if not file.size or file.size % IMAGE_BYTES:
        raise ValueError(f"{file.name} has {file.size} bytes, not a multiple of {IMAGE_BYTES}; download it again.")
    return file.size // IMAGE_BYTES


def _labels(file: RandomAccessFile, images: int, classes: list[str]) -> np.ndarray:
    """Labels int64 (N,), numbered from 0."""
    labels = np.frombuffer(file.read(0, file.size), np.uint8).astype(np.int64) - 1
    if len(labels) != images:
        raise ValueError(f"{file.name} has {len(labels)} labels for {images} images; download it again.")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(f"{file.name} has a label outside 1 to {len(classes)}; download it again.")
    return labels
