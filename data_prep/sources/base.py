"""What a source is: named splits of images with labels, and the names of the classes."""

import hashlib
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_prep.images.decode import BadImage, Decode

UNLABELLED = -1
MAX_BYTES = 1 << 30
"""A larger file is no image: 16 bits for each of three colors of as many pixels as are decoded."""


class Images(Protocol):
    """One split: images that are decoded when asked for, so that worker processes do it."""

    labels: np.ndarray
    """int32 (N,): the class of each image, -1 where unlabelled."""

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int, decode: Decode) -> np.ndarray:
        """uint8 (H, W, 3), RGB; `decode` decodes what is encoded. Raises BadImage if it can't be used."""
        ...


@dataclass(frozen=True)
class Encoded:
    """An image as it came off a stream: undecoded bytes, a name for messages, its class."""

    name: str
    content: bytes
    label: int


class ImageStream(Protocol):
    """A piece of a split, such as one tar, that is read from its beginning and whose length is not known.

    Pieces are read in any order, each by one process. What can't be used is yielded as a BadImage in its
    place, not raised; after one with the reason "damaged tar" nothing follows.
    """

    name: str
    """For messages."""

    def __iter__(self) -> Iterator[Encoded | BadImage]: ...


@dataclass(frozen=True)
class Source:
    """An opened source. `train` is a split or streamed; `valid` and `test` may be."""

    name: str
    classes: list[str]
    """Names by label; empty where the source knows none (a stream with bare numbers, or no labels)."""
    splits: dict[str, Images]
    streams: dict[str, list[ImageStream]]
    """Splits that are read as streams, piece by piece; a split is in one of the two."""
    fingerprint: str
    """Changes when images are added, removed or renamed; cheap, so it does not see inside image files."""
    cropped: bool = False
    """Whether the images are random crops already, so that `random_crop: auto` takes them whole."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What else the manifest should say of the source, in plain JSON types, such as what a label means."""

    def check_labels(self, split: str, labels: np.ndarray) -> None:
        """Raises ValueError if one of a split's labels (n,) is neither UNLABELLED nor a class's number."""
        last = (len(self.classes) or 1 << 31) - 1
        wrong = labels[(labels < UNLABELLED) | (labels > last)]
        if len(wrong):
            raise ValueError(
                f"{self.name} gives an image of {split} the label {wrong[0]}; it must be 0 to {last}, the "
                f"number of its class, or {UNLABELLED} for none."
            )


class ImageArray(Images):
    """Images held in memory, or in a memory map."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray) -> None:
        """pixels: uint8 (N, H, W, 3); labels: integers (N,)."""
        assert pixels.dtype == np.uint8 and pixels.ndim == 4 and len(pixels) == len(labels)
        self.pixels, self.labels = pixels, labels.astype(np.int32)

    def image(self, index: int, decode: Decode) -> np.ndarray:
        return self.pixels[index]


class Names:
    """Many file names in little memory: a million Python strings would take a hundred megabytes."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = bytearray()
        ends = [0]
        for name in names:
            encoded += name.encode(errors="surrogateescape")
            ends.append(len(encoded))
        self._encoded, self._ends = bytes(encoded), np.array(ends, np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return self._encoded[self._ends[index] : self._ends[index + 1]].decode(errors="surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


class ImageFiles(Images):
    """Picture files below a folder."""

    def __init__(self, folder: str, names: Iterable[str], labels: np.ndarray) -> None:
        """names: paths below `folder`; labels (N,)."""
        self.folder, self.names, self.labels = folder, Names(names), labels.astype(np.int32)
        assert len(self.names) == len(self.labels)

    def image(self, index: int, decode: Decode) -> np.ndarray:
        path = f"{self.folder}/{self.names[index]}"
        try:
            with open(path, "rb", buffering=0) as file:  # noqa: PTH123  (a Path and a buffer cost more than the read)
                size = os.fstat(file.fileno()).st_size
                if size > MAX_BYTES:
                    raise BadImage(path, "too large", f"{size:,} bytes")
                content = file.read()
        except OSError as error:
            raise BadImage(path, "unreadable", error.strerror or str(error)) from error
        return decode(content, path)


@contextmanager
def opened_archive(path: Path, name: str) -> Iterator[tarfile.TarFile]:
    """A tar, compressed or not. Raises ValueError with `name` for what can't be read of it."""
    try:
        with tarfile.open(path) as tar:
            yield tar
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{name} is no readable tar archive ({error}); fetch it again.") from error


def fingerprint(parts: Iterable[Any]) -> str:
    """sha256 over the text of `parts`."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
