"""Writes files and folders under a temporary name and renames them, so that whatever has its final name is complete."""

import ctypes
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from data_prep.common.contents import described

logger = logging.getLogger(__name__)

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""Errors of a file system that has no locks: Lustre mounted without -o flock, NFS without its lock daemon."""
RENAME_EXCHANGE, AT_FDCWD = 2, -100
"""Arguments of Linux's renameat2: swap the two names; relative paths start at the working directory."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path next to `path`; on success it is flushed to disk and renamed, else removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Nodes of a cluster share folders, and their process ids repeat: a random part makes the name unique.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid4().hex[:8]}.partial")
    try:
        yield temporary
        flush_to_disk(temporary)
        temporary.replace(path)
        flush_to_disk(path.parent)
    except OSError as error:
        if error.errno in DISK_FULL and error.filename is None:  # a failed write does not name its file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def take_lock(file: IO[Any], wait: bool = False) -> bool:
    """Takes an exclusive lock on an open file, across all nodes that share it. False if another process has it.

    Where the file system has no locks, it logs a warning and returns True: the command works without.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        logger.warning(
            f"{file.name} can't be locked ({error.strerror}): the file system has no locks, so make sure that no other "
            f"command writes there at the same time, or mount it with locks (Lustre: -o flock)"
        )
    return True


@contextmanager
def locked(path: Path, waiting_for: str) -> Iterator[None]:
    """Holds an exclusive lock on a file, across all nodes that share it. Logs a line if it has to wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        if not take_lock(file):
            logger.info(f"waiting for another command that writes {waiting_for}")
            take_lock(file, wait=True)
        yield


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields a new temporary folder; on success it is flushed to disk and replaces `folder`, else it is removed.

    The replacement is one step where the file system can swap names; the old folder is removed after it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}-{uuid4().hex[:8]}.partial")
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file() and not path.is_symlink():
                path.chmod(temporary.stat().st_mode & 0o666)  # follow the umask: safetensors makes its files private
            flush_to_disk(path)
        flush_to_disk(temporary)
        if folder.exists():
            _exchange(temporary, folder)
        else:
            temporary.rename(folder)
        flush_to_disk(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(first: Path, second: Path) -> None:
    """Swaps the names of two folders. On a file system without renameat2 (NFS), the second is missing for a moment."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None and renameat2(AT_FDCWD, bytes(first), AT_FDCWD, bytes(second), RENAME_EXCHANGE) == 0:
        return
    former = first.with_suffix(".former")
    second.rename(former)
    try:
        first.rename(second)
    except OSError:
        former.rename(second)
        raise
    former.rename(first)


def flush_to_disk(path: Path) -> None:
    """fsync of a file, or of a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(value: Any, indent: int | None = None) -> str:
    """`value` as JSON. NaN and Inf become null, because JSON has neither, and other programs refuse them."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        finite = json.loads(json.dumps(value), parse_constant=lambda _: None)
        return json.dumps(finite, indent=indent, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically; NaN and Inf become null."""
    with atomic_write(path) as temporary:
        temporary.write_text(to_json(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Raises ValueError naming the file if it is not JSON, OSError if it can't be read."""
    return parse_json(path.read_bytes(), str(path))


def parse_json(content: bytes, name: str) -> Any:
    """The value in a JSON file's content. Raises ValueError with the file's name if it is not JSON.

    NaN and Infinity, which earlier versions wrote, are read as None.
    """
    try:
        return json.loads(content, parse_constant=lambda _: None)
    except ValueError as error:
        if known := described(content):
            raise ValueError(f"{name} is {known}; it must be JSON.") from error
        raise ValueError(f"{name} is not readable as JSON ({error}); it was damaged after it was written.") from error


def json_digest(value: Any, separators: tuple[str, str] | None = None) -> str:
    """sha256 over `value` as JSON with sorted keys: equal for equal values, in any process.

    separators: as for `json.dumps`. They change the digest, so a digest on disk must be recomputed with its own.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=separators).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
