"""What offloading needs of a machine: compilers, and on NVMe a folder of each process.

DeepSpeed compiles its Adam for the host, and what reads and writes NVMe, on the machine that runs them.
"""

import fcntl
import os
import shutil
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from pipeline.config import ParallelConfig

FOLDER = "image-gpt-rank-"
LOCK = "lock"
_own_folder: tuple[Path, TextIO] | None = None
"""This process's on NVMe, and its lock."""


def new_folder(nvme: Path) -> Path:
    """A folder of this process alone: DeepSpeed names its files by rank, so that two runs would share them.

    Takes away those that a killed process left.
    """
    global _own_folder
    clear_own_folder()
    for left in nvme.glob(f"{FOLDER}*"):  # an OSError shows a process that lives, or that is about to take its lock
        with suppress(OSError), (left / LOCK).open() as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=FOLDER, dir=nvme))
    lock = (folder / LOCK).open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    _own_folder = folder, lock
    return folder


def clear_own_folder() -> None:
    """Deletes what this process put on NVMe."""
    global _own_folder
    if _own_folder is not None:
        folder, lock = _own_folder
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()
        _own_folder = None


def check_compilers(parallel: ParallelConfig) -> None:
    """Raises ValueError if what offloading needs could not be compiled here, or its folder could not be used."""
    what = parallel.offload
    if what == "none":
        return
    find_own_ninja()
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    if missing:
        raise ValueError(
            f"parallel.offload is {what}; DeepSpeed compiles the Adam it needs, and {' and '.join(missing)} is not to "
            f"be found on PATH; install it, or set parallel.offload to none."
        )
    if parallel.nvme_path is not None:
        _check_nvme(Path(parallel.nvme_path))


def _check_nvme(folder: Path) -> None:
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(
            f"parallel.nvme_path is {folder}; it must be a folder on a disk of each node, and be writable."
        )
    if not _takes_direct_writes(folder):
        raise ValueError(
            f"parallel.nvme_path is {folder}, whose file system does not take direct writes (O_DIRECT), as a disk in "
            f"memory does not; name a folder on a local disk, or leave it out to offload to memory."
        )
    if not has_libaio():
        raise ValueError(
            f"parallel.nvme_path is {folder}; DeepSpeed reads and writes it through libaio, which is not to be found; "
            f"install it with its headers (libaio-dev, libaio-devel), or leave parallel.nvme_path out to offload to "
            f"memory."
        )


def has_libaio() -> bool:
    """Whether a program that uses it can be compiled."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible())


def _takes_direct_writes(folder: Path) -> bool:
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        try:
            os.close(os.open(file.name, os.O_RDWR | os.O_DIRECT))
        except OSError:
            return False
    return True


def find_own_ninja() -> None:
    """Puts the environment's programs on PATH, ninja among them: it need not be activated."""
    own = str(Path(sys.executable).parent)
    if own not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), own])
