"""Images inside an uncompressed tar, read by offset without extracting them."""

import os
import tarfile
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.common.contents import described
from data_prep.images.decode import BadImage, Decode
from data_prep.sources.base import Images, Names
from data_prep.sources.tar_stream import AFTER_END, is_padding, may_follow

BLOCK = 512
"""A tar's headers and contents start at multiples of this many bytes."""


class RandomAccessFile:
    """An open file that is read by offset, so that forked processes can share it."""

    def __init__(self, name: str, descriptor: int) -> None:
        """name: for messages; descriptor: closed with this object."""
        self.name, self._descriptor = name, descriptor
        self.size = os.fstat(descriptor).st_size
        weakref.finalize(self, os.close, descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on; fewer only at the end of the file."""
        return os.pread(self._descriptor, size, offset)


def open_random_access(path: Path) -> RandomAccessFile:
    """Raises ValueError naming the file if it can't be opened."""
    try:
        return RandomAccessFile(str(path), os.open(path, os.O_RDONLY))
    except OSError as error:
        raise ValueError(f"{path} can't be read ({error.strerror}); it must be a readable file.") from error


@dataclass(frozen=True)
class Member:
    """A file inside a tar."""

    name: str
    offset: int
    """The offset of its content in the outermost file, in bytes."""
    size: int


def tar_members(file: RandomAccessFile, inside: Member | None = None) -> Iterator[Member]:
    """The regular files of an uncompressed tar: of the entire file, or of a tar that is itself a member of it.

    Only headers are read. Raises ValueError naming the tar and the offset where it is damaged or truncated;
    `tarfile` would take either for the end. Tars that were concatenated are read to the last. Names are truncated to
    100 characters.
    """
    name = file.name if inside is None else f"{file.name}/{inside.name}"
    start, end = (0, file.size) if inside is None else (inside.offset, inside.offset + inside.size)
    offset = start
    begin, zeros, padding = 0, None, False  # of the current tar: start, end-of-archive blocks, other bytes after them
    while True:
        header = file.read(offset, min(BLOCK, max(0, end - offset)))
        if not header and zeros is not None:
            return
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            if header == bytes(BLOCK):
                zeros = offset - start if zeros is None else zeros
            elif is_padding(zeros, offset - start, len(header) < BLOCK):
                padding = True
            else:
                raise ValueError(_damage(name, header, offset - start, str(error))) from error
            offset += BLOCK
            continue
        if padding or (zeros is not None and not may_follow(begin, zeros, offset - start)):
            raise ValueError(f"{name} is damaged at byte {offset - start} ({AFTER_END}); download it again.")
        if zeros is not None:
            begin, zeros = offset - start, None
        content = offset + BLOCK
        if member.size < 0:
            raise ValueError(f"{name} is damaged at byte {offset - start} (size {member.size}); download it again.")
        if content + member.size > end:
            raise ValueError(f"{name} is truncated in {member.name}; download it again.")
        if member.isreg():
            yield Member(member.name, content, member.size)
        offset = content + -(-member.size // BLOCK) * BLOCK


def _damage(name: str, header: bytes, offset: int, error: str) -> str:
    """A sentence on bytes that are not a header."""
    known = described(header) if offset == 0 else None
    if known is not None:
        return f"{name} is {known}; it must be an uncompressed tar."
    what = "is truncated" if len(header) < BLOCK else "is damaged, or not an uncompressed tar,"
    return f"{name} {what} at byte {offset} ({error}); download it again."


class TarImages(Images):
    """Image files inside an uncompressed tar, at known offsets."""

    def __init__(
        self, file: RandomAccessFile, names: Iterable[str], offsets: np.ndarray, sizes: np.ndarray, labels: np.ndarray
    ) -> None:
        """names: for messages; offsets and sizes: int64 (N,), in bytes; labels: integers (N,)."""
        self.file, self.names, self.labels = file, Names(names), labels.astype(np.int32)
        self.offsets, self.sizes = offsets, sizes
        assert len(self.names) == len(offsets) == len(sizes) == len(labels)

    def name(self, index: int) -> str:
        return f"{self.file.name}/{self.names[index]}"

    def image(self, index: int, decode: Decode) -> np.ndarray:
        name = self.name(index)
        size = int(self.sizes[index])
        try:
            content = self.file.read(int(self.offsets[index]), size)
        except OSError as error:
            raise BadImage(name, "unreadable", error.strerror or str(error)) from error
        if len(content) < size:
            raise BadImage(name, "unreadable", "the tar became shorter while it was read")
        return decode(content, name)
