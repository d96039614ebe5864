"""Cache of finished work on disk: a command that restarts, and other tasks, compute only what is missing.

    NAME.npz     a value: arrays by name, and JSON data; the state of a training run is such a value
    NAME.npy     a large array that the ranks fill batch by batch; NAME.batches/ lists the batches on disk, and
                 NAME.json, which holds its digest, is written when it is complete

A damaged file is logged and recomputed.
"""

import json
import logging
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from data_prep.common.files import atomic_write, file_sha256, locked, write_json
from pipeline.distributed import from_first

logger = logging.getLogger(__name__)

UNFINISHED = ".unfinished"
SECONDS_BETWEEN_RECORDS = 20.0
"""Interval at which finished batches of a large array are recorded: a killed command loses at most this much work."""
_JSON = "plain json"

Write = Callable[[int, np.ndarray], None]
"""`write(start, batch)`: writes a batch, float32 (L, B, D), to the rows of a large array that start at `start`."""


class TaskCache:
    """Cached values and arrays in one folder, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of_task(cls, results: Path, task: str, inputs_digest: str) -> "TaskCache":
        """The cache of one task's unfinished work; inputs_digest: of everything that the result depends on."""
        return cls(results / UNFINISHED / task / inputs_digest[:16])

    def get_or_compute(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The value under a name, computed if it is not cached. Only the rank that owns the work item calls it."""
        cached = self.get(name)
        return self.put(name, compute()) if cached is None else cached

    def get(self, name: str) -> dict[str, Any] | None:
        """The value under a name; None if it is not cached, or if the file is damaged, which is logged."""
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                return {key: file[key] for key in file.files if key != _JSON} | json.loads(str(file[_JSON]))
        except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile):
            logger.warning(f"{path} can't be read; its content is recomputed")
            return None

    def put(self, name: str, value: dict[str, Any]) -> dict[str, Any]:
        """Writes a value atomically, and returns it as `get` will."""
        arrays = {key: part for key, part in value.items() if isinstance(part, np.ndarray)}
        plain = json.dumps({key: part for key, part in value.items() if key not in arrays})
        with atomic_write(self._path(name)) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays, **{_JSON: np.array(plain)})
        return arrays | json.loads(plain)

    def keep_only(self, pattern: str, name: str) -> None:
        """Deletes the values under other names that match a pattern."""
        for path in self.folder.glob(f"{pattern}.npz"):
            if path != self._path(name):
                path.unlink()

    def array(
        self,
        name: str,
        shape: tuple[int, int, int],
        facts: dict[str, Any],
        fill: Callable[[Write, set[int]], None],
    ) -> np.ndarray:
        """The float32 array (L, N, D) under a name, as a memory map that every rank reads. All ranks call it together.

        If the array is not complete, every rank calls `fill(write, done)` and writes its share of the missing batches;
        `done` has the starts of the batches that are already on disk. facts: written into the manifest.
        """
        file = CachedArray(self.folder, name)
        with ExitStack() as stack:  # another command that needs this array waits, then finds it complete
            from_first(lambda: stack.enter_context(locked(file.lock, str(file.path))))
            if not from_first(file.is_complete):
                from_first(lambda: file.reserve(shape))
                done = from_first(file.finished_batches)  # the same on all ranks, which divide the rest among them
                with file.writer(PartialState().process_index) as write:
                    fill(write, done)
                PartialState().wait_for_everyone()
                from_first(lambda: file.seal(facts))
        return np.load(file.path, mmap_mode="r")

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npz"


def clear_unfinished(results: Path, task: str) -> None:
    """Deletes a task's unfinished work, for all inputs."""
    shutil.rmtree(results / UNFINISHED / task, ignore_errors=True)


def lock_of(results: Path, task: str) -> Path:
    """The file that a command locks while it runs a task."""
    return results / UNFINISHED / f".{task}.lock"


class CachedArray:
    """A large array in one file: NAME.npy is complete once NAME.json, which holds its digest, exists."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path, self.lock = folder / f"{name}.npy", folder / f".{name}.npy.lock"
        self._manifest, self._batches = folder / f"{name}.json", folder / f"{name}.batches"

    def is_complete(self) -> bool:
        """Whether the file matches the digest in its manifest; a damaged file is logged and removed."""
        if not self._manifest.is_file():
            return False
        try:
            expected = json.loads(self._manifest.read_text())["sha256"]
            if file_sha256(self.path) == expected:
                return True
        except (OSError, ValueError, KeyError, TypeError):
            pass
        logger.warning(f"{self.path} does not match its digest; it is recomputed")
        self._remove()
        return False

    def reserve(self, shape: tuple[int, ...]) -> None:
        """Creates the file with its space allocated, unless a killed command left it.

        Without allocation, writing to the map on a full disk would kill the process.
        """
        try:
            if self.path.is_file() and np.load(self.path, mmap_mode="r").shape == shape:
                return
        except (OSError, ValueError):
            pass
        self._remove()
        try:
            np.lib.format.open_memmap(self.path, mode="w+", dtype=np.float32, shape=shape)
            with self.path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        except OSError as error:
            self._remove()
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    @contextmanager
    def writer(self, rank: int) -> Iterator[Write]:
        """Yields `write(start, batch)`, which writes float32 (L, B, D) to the rows start..start + B.

        Every SECONDS_BETWEEN_RECORDS, and at the end, the batches are flushed to disk and recorded.
        """
        mapped, unrecorded, recorded_at = np.load(self.path, mmap_mode="r"), list[int](), time.monotonic()

        def write(start: int, batch: np.ndarray) -> None:
            # Written to the file, not through the map: two nodes that map the same page of a network file overwrite
            # each other's bytes at the borders of their rows.
            nonlocal recorded_at
            for layer, rows in enumerate(batch):  # (B, D)
                file.seek(mapped.offset + (layer * mapped.shape[1] + start) * rows[0].nbytes)
                file.write(rows.tobytes())
            unrecorded.append(start)
            if time.monotonic() - recorded_at > SECONDS_BETWEEN_RECORDS:
                record()
                recorded_at = time.monotonic()

        def record() -> None:
            file.flush()
            os.fsync(file.fileno())
            self.record_batches(rank, unrecorded)
            unrecorded.clear()

        with self.path.open("r+b") as file:
            yield write
            record()

    def finished_batches(self) -> set[int]:
        """The starts of the batches that are on disk."""
        lines = [line for file in self._batches.glob("rank-*") for line in file.read_text().splitlines()]
        return {int(line[:-1]) for line in lines if line.endswith(";")}  # a kill may have cut off the last line

    def record_batches(self, rank: int, batches: list[int]) -> None:
        """Records batches that this rank has flushed to disk."""
        self._batches.mkdir(exist_ok=True)
        with (self._batches / f"rank-{rank}").open("a") as file:
            file.writelines(f"\n{first};" for first in batches)  # the line break ends a line that a kill cut off

    def seal(self, facts: dict[str, Any]) -> None:
        """Writes the manifest, which marks the file complete."""
        write_json(self._manifest, facts | {"sha256": file_sha256(self.path)})
        shutil.rmtree(self._batches)

    def _remove(self) -> None:
        self._manifest.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        shutil.rmtree(self._batches, ignore_errors=True)
