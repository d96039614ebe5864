"""Reads an untrusted tar as a stream; every kind of damage is an error.

Python's tarfile takes many kinds of damage for the end of the tar, and trusts every size in a header.
"""

import bz2
import gzip
import lzma
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

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


class DamagedTar(Exception):
    """The bytes are not a complete tar."""


class Header(tarfile.TarInfo):
    """A member's header. A damaged header is not taken for the end of the tar, and its size is checked."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "Header":
        try:
            return cast(Header, super().fromtarfile(tarfile_))
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # a block of zeros: the end
            raise
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
            # GNU tar, bsdtar, Python, Go and webdataset all end a tar with blocks of zeros. They are missing if the
            # writer was killed, or if a copy broke off between two members, so images may be missing too.
            what = "it has no end-of-archive blocks" if tarfile_.offset else "it is empty"
            raise DamagedTar(what) from error
        except tarfile.HeaderError as error:
            raise DamagedTar(str(error)) from error

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
        self._tar: tarfile.TarFile | None = None
        self.offset = 0
        """The offset of the current member's header; in a compressed tar, its offset after decompression."""

    def next(self) -> tarfile.TarInfo | None:
        with self._damage():
            if self._tar is None:
                # Not "r|*": of a gzip file with several streams (pigz, bgzip) it reads only the first, and it does
                # not verify the checksum.
                self._tar = tarfile.open(fileobj=self._bytes.decompressed(), mode="r|", tarinfo=Header)  # noqa: SIM115
            else:
                self.offset = self._tar.offset
            member = self._tar.next()
            self._tar.members.clear()  # type: ignore[attr-defined]  # else all headers stay in memory
            if member is not None:
                cast(Header, member).check_size(MEMBER_LIMIT)  # an extended header may have changed the size
            return member

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
            if isinstance(error, DamagedTar | MemoryError):
                raise
            raise DamagedTar(str(error) or type(error).__name__) from error


class TarBytes:
    """A file's bytes. Stores an error in reading them, so that it can be distinguished from damage."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._ahead = b""
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
        self._ahead = self.read(10)
        if self._ahead.startswith(b"\x1f\x8b\x08"):
            return gzip.GzipFile(fileobj=cast(BinaryIO, self))
        if self._ahead.startswith(b"BZh") and self._ahead[4:10] == b"1AY&SY":
            return bz2.BZ2File(cast(BinaryIO, self))
        if self._ahead.startswith(b"\xfd7zXZ\0"):
            return lzma.LZMAFile(cast(BinaryIO, self))
        return self
