"""Requirements of offloading: compilers, and a folder on NVMe for each process.

DeepSpeed compiles its CPU Adam and its NVMe reader and writer on the machine that runs them.
"""

import fcntl
import os
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TextIO

import torch

from pipeline.compilers import path_with_space
from pipeline.config import ParallelConfig

FOLDER = "image-gpt-rank-"
LOCK = "lock"
EXTENSIONS = ("cpu_adam", "async_io")
LOCK_MINUTES = 15.0
"""Compiling one extension takes less."""
_own_folder: tuple[Path, TextIO] | None = None
"""This process's folder on NVMe, and its lock."""


def new_folder(nvme: Path) -> Path:
    """Creates a folder for this process: DeepSpeed names its files by rank, and two runs must not share them.

    Deletes the folders of killed processes.
    """
    global _own_folder
    clear_own_folder()
    for left in nvme.glob(f"{FOLDER}*"):  # OSError: the process is alive, or about to take its lock
        with suppress(OSError), (left / LOCK).open() as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=FOLDER, dir=nvme))
    lock = (folder / LOCK).open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    _own_folder = folder, lock
    return folder


def clear_own_folder() -> None:
    """Deletes this process's folder on NVMe."""
    global _own_folder
    if _own_folder is not None:
        folder, lock = _own_folder
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()
        _own_folder = None


def check_compilers(parallel: ParallelConfig, device: torch.device) -> None:
    """Raises ValueError if offloading can't compile its extensions here for `device`, or can't use its folder."""
    what = parallel.offload
    if what == "none":
        return
    add_environment_to_path()
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    if missing:
        raise ValueError(
            f"parallel.offload is {what}; DeepSpeed compiles its CPU Adam, and {' and '.join(missing)} is not on PATH; "
            f"install it, or set parallel.offload to none."
        )
    _check_locks()
    if folder := path_with_space():
        raise ValueError(
            f"parallel.offload is {what}; DeepSpeed can't compile its CPU Adam in {folder}, whose path has a space; "
            f"move it, or set parallel.offload to none."
        )
    if parallel.nvme_path is not None:
        _check_nvme(Path(parallel.nvme_path), device)


def _check_locks() -> None:
    """Raises ValueError if a killed process has left its lock: torch waits without a limit until that is deleted."""
    from torch.utils import cpp_extension

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    for lock in chain.from_iterable(root.glob(f"{where}{name}/lock") for name in EXTENSIONS for where in ("", "*/")):
        with suppress(FileNotFoundError):  # compiled meanwhile
            minutes = (time.time() - lock.stat().st_mtime) / 60
            if minutes > LOCK_MINUTES:
                raise ValueError(
                    f"{lock} was created {minutes:.0f} minutes ago by a process that compiles an extension of "
                    f"DeepSpeed and seems to have been killed; every start would wait for it. Delete the file."
                )


def _check_nvme(folder: Path, device: torch.device) -> None:
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"parallel.nvme_path is {folder}; it must be a writable folder on a local disk of each node.")
    if not _takes_direct_writes(folder):
        raise ValueError(
            f"parallel.nvme_path is {folder}, whose file system has no direct writes (O_DIRECT), like a tmpfs; "
            f"name a folder on a local disk, or set it to null to offload to host memory."
        )
    if device.type == "cuda" and lacks_cuda_toolkit():
        raise ValueError(
            f"parallel.nvme_path is {folder}; DeepSpeed compiles its reader and writer with the CUDA toolkit, which is "
            f"not found; install it or load its module and set CUDA_HOME to its folder, or set parallel.nvme_path to "
            f"null to offload to host memory."
        )
    if not has_libaio():
        raise ValueError(
            f"parallel.nvme_path is {folder}; DeepSpeed reads and writes it through libaio, which is not installed; "
            f"install it with its headers (libaio-dev, libaio-devel), or set parallel.nvme_path to null to offload to "
            f"host memory."
        )


def has_libaio() -> bool:
    """Whether a program that uses libaio can be compiled."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible())


def lacks_cuda_toolkit() -> bool:
    """Whether torch's compiler of extensions finds no CUDA, which DeepSpeed's JIT build requires; ROCm has its own."""
    from torch.utils import cpp_extension

    home = cpp_extension.CUDA_HOME
    return torch.version.hip is None and (home is None or not Path(home).is_dir())


def _takes_direct_writes(folder: Path) -> bool:
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        try:
            os.close(os.open(file.name, os.O_RDWR | os.O_DIRECT))
        except OSError:
            return False
    return True


def add_environment_to_path() -> None:
    """Appends the programs of the Python environment to PATH: ninja is found even if it is not activated."""
    own = str(Path(sys.executable).parent)
    if own not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), own])
