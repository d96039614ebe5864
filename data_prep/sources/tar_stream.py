"""Reads an untrusted tar as a stream; every kind of damage is an error.

Python's tarfile takes many kinds of damage for the end of the tar, ends at the first block of zeros, and trusts every
size in a header. Here a tar ends where its file ends: tars that were concatenated with `cat` are read to the last.
"""

import bz2
import gzip
import lzma
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from data_prep.common.contents import described_data

MEMBER_LIMIT = 1 << 30
"""Largest size of a member, in bytes."""
HEADER_LIMIT = 1 << 20
"""Largest size of a long name or of an extended header, in bytes."""
EXTENDED_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
AFTER_END = "there are other bytes after its end-of-archive blocks"


class DamagedTar(Exception):
    """The bytes are not a complete tar."""


def is_padding(end: int | None, offset: int, truncated: bool) -> bool:
    """Whether bytes at `offset` that are not a header may follow the end of a tar.

    They may fill the record in which the tar ended, as some writers fill the last 10,240 bytes with what was in their
    memory, or be too few for a header. end: the offset of the end-of-archive blocks.
    """
    return end is not None and (truncated or offset // tarfile.RECORDSIZE == end // tarfile.RECORDSIZE)


def may_follow(begin: int, end: int, offset: int) -> bool:
    """Whether a tar may begin at `offset` after one from `begin` to the end-of-archive blocks at `end`.

    Else the blocks of zeros are rather a hole in a tar, such as a page that a file system lost.
    """
    return offset - end <= 2 * tarfile.BLOCKSIZE or (offset - begin) % tarfile.RECORDSIZE == 0


class Archive(tarfile.TarFile):
    """Reads on after blocks of zeros, and remembers them."""

    ignore_zeros = True
    begin = 0
    """The offset of the first header: of the current tar, if several were concatenated."""
    end: int | None = None
    """The offset of the first of the blocks of zeros before the current position; None after a member."""
    has_padding = False
    """Whether there was something else than zeros or a member after `end`."""


class Header(tarfile.TarInfo):
    """A member's header. A damaged header is not taken for the end of the tar, and its size is checked."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "Header":
        archive = cast(Archive, tarfile_)
        offset, end = archive.offset, archive.end
        try:
            header = cast(Header, super().fromtarfile(archive))
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # a block of zeros
            archive.end = offset if end is None else end
            raise
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
            if end is not None:
                raise
            # GNU tar, bsdtar, Python, Go and webdataset all end a tar with blocks of zeros. They are missing if the
            # writer was killed, or if a copy broke off between two members, so images may be missing too.
            what = "it has no end-of-archive blocks" if offset else "it is empty"
            raise DamagedTar(what) from error
        except tarfile.HeaderError as error:
            truncated = isinstance(error, tarfile.TruncatedHeaderError)  # type: ignore[attr-defined]
            if not is_padding(end, offset, truncated):
                raise DamagedTar(str(error) if end is None else AFTER_END) from error
            archive.has_padding = True
            raise tarfile.EOFHeaderError("padding") from error  # type: ignore[attr-defined]
        if archive.has_padding or (end is not None and not may_follow(archive.begin, end, offset)):
            raise DamagedTar(AFTER_END)
        if end is not None:
            archive.begin, archive.end = offset, None
        return header

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "Header":
        header = super().frombuf(buf, encoding, errors)
        header.check_size(HEADER_LIMIT if header.type in EXTENDED_HEADERS else MEMBER_LIMIT)
        return header

    def check_size(self, limit: int) -> None:
        """Raises DamagedTar if the size is invalid, before memory is allocated for it."""
        if not 0 <= self.size <= limit:
            raise DamagedTar(f"the header of a member has the size {self.size}")


class Tar:
    """The members of a tar, in order. Damage raises DamagedTar; errors of the underlying file are raised unchanged."""

    def __init__(self, file: BinaryIO) -> None:
        self._bytes = TarBytes(file)
        self._tar: Archive | None = None
        self.offset = 0
        """The offset of the current member's header; in a compressed tar, its offset after decompression."""

    def next(self) -> tarfile.TarInfo | None:
        with self._damage():
            if self._tar is None:
                # Not "r|*": of a gzip file with several streams (pigz, bgzip) it reads only the first, and it does
                # not verify the checksum.
                self._tar = Archive.open(fileobj=self._bytes.decompressed(), mode="r|", tarinfo=Header)
            else:
                self.offset = self._tar.offset
            member = self._next_header(self._tar)
            self._tar.members.clear()  # type: ignore[attr-defined]  # else all headers stay in memory
            if member is not None:
                cast(Header, member).check_size(MEMBER_LIMIT)  # an extended header may have changed the size
            elif self._bytes.read(1):  # such as an uncompressed tar after a compressed one
                raise DamagedTar("there are other bytes after its compressed data")
            return member

    def _next_header(self, tar: Archive) -> tarfile.TarInfo | None:
        try:
            return tar.next()
        except gzip.BadGzipFile as error:
            if tar.end is None or not str(error).startswith("Not a gzipped file"):
                raise
            return None  # like gzip, ignores a few bytes after the compressed data

    def content(self, member: tarfile.TarInfo, limit: int) -> bytes:
        """The member's bytes, at most `limit`."""
        with self._damage():
            assert self._tar is not None
            file = self._tar.extractfile(member)
            assert file is not None
            return file.read(min(member.size, limit))

    @contextmanager
    def _damage(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # tarfile and the decompressors may raise any exception on damaged files
            if self._bytes.error is not None:
                raise self._bytes.error from None
            if self._tar is None and (what := described_data(self._bytes.start)):
                raise DamagedTar(f"{error}; it is {what}") from error
            if isinstance(error, DamagedTar | MemoryError):
                raise
            raise DamagedTar(str(error) or type(error).__name__) from error


class TarBytes:
    """A file's bytes. Stores an error in reading them, so that it can be distinguished from damage."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._ahead = b""
        self.start = b""
        """The first bytes, once `decompressed` was called."""
        self.error: Exception | None = None

    def read(self, size: int) -> bytes:
        ahead, self._ahead = self._ahead[:size], self._ahead[size:]
        try:
            return ahead + self._file.read(size - len(ahead))
        except Exception as error:
            self.error = error
            raise

    def decompressed(self) -> Any:
        """The decompressed bytes; compression is detected from the content, not from the name."""
        self.start = self._ahead = self.read(tarfile.BLOCKSIZE)
        if self._ahead.startswith(b"\x1f\x8b\x08"):
            return gzip.GzipFile(fileobj=cast(BinaryIO, self))
        if self._ahead.startswith(b"BZh") and self._ahead[4:10] == b"1AY&SY":
            return bz2.BZ2File(cast(BinaryIO, self))
        if self._ahead.startswith(b"\xfd7zXZ\0"):
            return lzma.LZMAFile(cast(BinaryIO, self))
        return self
