"""The interface of sources: named splits of images with labels, and the names of the classes."""

import hashlib
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_prep.common.contents import described_file
from data_prep.images.decode import BadImage, Decode

UNLABELLED = -1
MAX_CLASSES = 1_000_000
"""Labels are below it. Larger numbers are identifiers, and the manifest has a name for each number of a class."""
MAX_BYTES = 1 << 30
"""Larger files are rejected: 16 bits for each of three colors of the largest number of pixels that is decoded."""


class Images(Protocol):
    """One split with random access. Images are decoded on demand, in the worker processes."""

    labels: np.ndarray
    """int32 (N,): the class of each image, -1 where unlabelled."""

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """For messages."""
        return f"image {index}"

    def image(self, index: int, decode: Decode) -> np.ndarray:
        """uint8 (H, W, 3), RGB; `decode` decodes the contents of an image file. Raises BadImage if it can't be used."""
        ...


@dataclass(frozen=True)
class Encoded:
    """An image of a stream: undecoded bytes, a name for messages, its class."""

    name: str
    content: bytes
    label: int


class ImageStream(Protocol):
    """A part of a split, such as one tar, that is read from its start and whose length is unknown.

    The streams of a split are read in any order, each by one process. An image that can't be used is yielded as a
    BadImage, not raised. After a BadImage with the reason "damaged tar", the rest of that tar is lost.
    """

    name: str
    """For messages."""

    def __iter__(self) -> Iterator[Encoded | BadImage]: ...


@dataclass(frozen=True)
class Source:
    """An opened source. `train` is required, `valid` and `test` are optional; each is in `splits` or in `streams`."""

    name: str
    classes: list[str]
    """Names by label; empty if the source has none (no labels, or a stream with only numbers)."""
    splits: dict[str, Images]
    """Splits with random access."""
    streams: dict[str, list[ImageStream]]
    """Splits that are read as streams."""
    fingerprint: str
    """Changes when images are added, removed or renamed. It does not depend on the contents of image files."""
    cropped: bool = False
    """Whether the images are already random crops, so that `random_crop: auto` does not crop them again."""
    facts: dict[str, Any] = field(default_factory=dict)
    """More entries for the manifest's `source`, in plain JSON types, such as the meaning of a label."""
    filtered: dict[str, dict[str, int]] = field(default_factory=dict)
    """By split with random access: the numbers of images that source.where excludes, by reason."""
    near_duplicate: Callable[[np.ndarray], str | None] | None = None
    """Set by exclude: of which excluded image an image uint8 (H, W, 3) is a near-duplicate, if of any."""

    def original_of(self, image: np.ndarray, split: str) -> str | None:
        """The excluded image of which an image uint8 (H, W, 3) of a split of the source is a near-duplicate, if any.

        Only `train` is searched, also for a `valid` that is held out of it: the source's own `valid` and `test` stay
        complete, so that results on them can be compared.
        """
        return self.near_duplicate(image) if split == "train" and self.near_duplicate else None

    def check_labels(self, split: str, labels: np.ndarray) -> None:
        """Raises ValueError if one of a split's labels (n,) is neither UNLABELLED nor the number of a class."""
        last = (len(self.classes) or MAX_CLASSES) - 1
        wrong = labels[(labels < UNLABELLED) | (labels > last)]
        if len(wrong):
            raise ValueError(
                f"{self.name} has an image in {split} with the label {wrong[0]}; it must be 0 to {last}, the number of "
                f"a class, or {UNLABELLED} for none."
            )


class ImageArray(Images):
    """Images in memory, or in a memory map."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray) -> None:
        """pixels: uint8 (N, H, W, 3); labels: integers (N,)."""
        assert pixels.dtype == np.uint8 and pixels.ndim == 4 and len(pixels) == len(labels)
        self.pixels, self.labels = pixels, labels.astype(np.int32)

    def image(self, index: int, decode: Decode) -> np.ndarray:
        return self.pixels[index]


class Names:
    """A compact list of file names: a million Python strings would take a hundred megabytes."""

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
    """Image files below a folder."""

    def __init__(self, folder: str, names: Iterable[str], labels: np.ndarray) -> None:
        """names: paths below `folder`; labels (N,)."""
        self.folder, self.names, self.labels = folder, Names(names), labels.astype(np.int32)
        assert len(self.names) == len(self.labels)

    def name(self, index: int) -> str:
        return f"{self.folder}/{self.names[index]}"

    def image(self, index: int, decode: Decode) -> np.ndarray:
        path = self.name(index)
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
def open_archive(path: Path, name: str) -> Iterator[tarfile.TarFile]:
    """Opens a tar, compressed or not. Raises ValueError with `name` if it can't be read, also inside the block."""
    try:
        with tarfile.open(path) as tar:
            yield tar
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        what = f"it is {known}" if (known := described_file(path)) else error
        raise ValueError(f"{name} is not a readable tar archive ({what}); download it again.") from error


def fingerprint(parts: Iterable[Any]) -> str:
    """sha256 over the text of `parts`."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
