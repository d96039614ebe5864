"""A tar read from its beginning and trusted in nothing: every kind of damage is an error.

Python's tarfile takes many of them for the end of the tar, and believes each size that a header names.
"""

import bz2
import gzip
import lzma
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

MEMBER_LIMIT = 1 << 30
"""Bytes of a member."""
HEADER_LIMIT = 1 << 20
"""Bytes of a long name, or of an extended header."""
EXTENDED_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


class DamagedTar(Exception):
    """The bytes are no complete tar."""


class Header(tarfile.TarInfo):
    """A member's header that is never taken for the end of the tar when it is damaged, nor believed in its size."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "Header":
        try:
            return cast(Header, super().fromtarfile(tarfile_))
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # a block of zeros: the end
            raise
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
            # GNU tar, bsdtar, Python, Go and webdataset all end a tar with blocks of zeros, and pad it. It lacks them
            # if who wrote it died before closing it, or a copy broke off between members: pictures may be missing.
            what = "it ends without the mark of its end" if tarfile_.offset else "it is empty"
            raise DamagedTar(what) from error
        except tarfile.HeaderError as error:
            raise DamagedTar(str(error)) from error

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "Header":
        header = super().frombuf(buf, encoding, errors)
        header.check_size(HEADER_LIMIT if header.type in EXTENDED_HEADERS else MEMBER_LIMIT)
        return header

    def check_size(self, limit: int) -> None:
        """Raises DamagedTar, before so much memory is taken."""
        if not 0 <= self.size <= limit:
            raise DamagedTar(f"a member claims to have {self.size} bytes")


class Tar:
    """The members of a tar in their order; every damage is a DamagedTar, and every error of the file stays itself."""

    def __init__(self, file: BinaryIO) -> None:
        self._bytes = TarBytes(file)
        self._tar: tarfile.TarFile | None = None
        self.place = 0
        """The byte at which the member begins that was asked for last; in a compressed tar, of what it holds."""

    def next(self) -> tarfile.TarInfo | None:
        with self._damage():
            if self._tar is None:
                # No "r|*": it reads the first part of a gzip file of several (pigz, bgzip), and no checksum.
                self._tar = tarfile.open(fileobj=self._bytes.decompressed(), mode="r|", tarinfo=Header)  # noqa: SIM115
            else:
                self.place = self._tar.offset
            member = self._tar.next()
            self._tar.members.clear()  # type: ignore[attr-defined]  # else it keeps the header of each member
            if member is not None:
                cast(Header, member).check_size(MEMBER_LIMIT)  # an extended header may have changed it
            return member

    def content(self, member: tarfile.TarInfo, limit: int) -> bytes:
        """The member's bytes, `limit` of them at most."""
        with self._damage():
            assert self._tar is not None
            file = self._tar.extractfile(member)
            assert file is not None
            return file.read(min(member.size, limit))

    @contextmanager
    def _damage(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # tarfile and the decompressors raise nearly anything on damaged files
            if self._bytes.error is not None:
                raise self._bytes.error from None
            if isinstance(error, DamagedTar | MemoryError):
                raise
            raise DamagedTar(str(error) or type(error).__name__) from error


class TarBytes:
    """A file's bytes, and the error if they could not be had, which else could not be told from damage."""

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
        """Something to read the tar from, whatever its name says of compression."""
        self._ahead = self.read(10)
        if self._ahead.startswith(b"\x1f\x8b\x08"):
            return gzip.GzipFile(fileobj=cast(BinaryIO, self))
        if self._ahead.startswith(b"BZh") and self._ahead[4:10] == b"1AY&SY":
            return bz2.BZ2File(cast(BinaryIO, self))
        if self._ahead.startswith(b"\xfd7zXZ\0"):
            return lzma.LZMAFile(cast(BinaryIO, self))
        return self
