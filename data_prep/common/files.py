"""Files and folders written under a temporary name and renamed, so that what stands under its name is complete."""

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
from typing import Any
from uuid import uuid4

logger = logging.getLogger(__name__)

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
RENAME_EXCHANGE, HERE = 2, -100
"""Of Linux's renameat2: swap the two names; paths are as usual."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is flushed to disk and renamed, else removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name is unlike any other's: the nodes of a cluster share folders, and their process numbers repeat.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid4().hex[:8]}.partial")
    try:
        yield temporary
        flush_to_disk(temporary)
        temporary.replace(path)
        flush_to_disk(path.parent)
    except OSError as error:
        if error.errno in DISK_FULL and error.filename is None:  # a failed write does not say of which file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, waiting_for: str) -> Iterator[None]:
    """Keeps other processes that lock the same file out, on all nodes that share it; prints a line if it waits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info(f"waiting for another command that writes {waiting_for}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields a new folder beside `folder`; on success it is flushed to disk and takes that one's place, else it goes.

    What stood there goes once the new one is in place; both change in one step where the file system can swap names.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}-{uuid4().hex[:8]}.partial")
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file() and not path.is_symlink():
                path.chmod(temporary.stat().st_mode & 0o666)  # as the umask has it; safetensors keeps its files private
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
    """Swaps two folders' names; on a file system that can't (NFS, for one), the second is missing for a moment."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None and renameat2(HERE, bytes(first), HERE, bytes(second), RENAME_EXCHANGE) == 0:
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
    """fsync of a file or of a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Raises ValueError naming the file if it is not JSON, OSError if it can't be read."""
    return parse_json(path.read_bytes(), str(path))


def parse_json(content: bytes, name: str) -> Any:
    """The value in a JSON file's content. Raises ValueError with the file's name if it is not JSON."""
    try:
        return json.loads(content)
    except ValueError as error:
        raise ValueError(f"{name} is not readable as JSON ({error}); it was damaged after it was written.") from error


def json_digest(value: Any, separators: tuple[str, str] | None = None) -> str:
    """sha256 over `value` as JSON with sorted keys: equal for equal values, in any process.

    separators: as `json.dumps` takes them; a digest that is on disk keeps those that it was made with.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=separators).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
