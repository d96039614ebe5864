"""Finished work on disk, so that a command that was killed, or another task, computes only what is missing.

    NAME.npz     a value: arrays by name, and what JSON can hold; so also the state of a training
    NAME.npy     a large array that the ranks fill piece by piece; NAME.batches/ notes what is there, and NAME.json with
                 its digest completes it

What is damaged is reported, and computed again.
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
SECONDS_BETWEEN_NOTES = 20.0
"""A killed command computes at most this much of a large array again."""
_JSON = "plain json"

Write = Callable[[int, np.ndarray], None]
"""Of a batch float32 (L, B, D) to the rows of a large array from a start on."""


class TaskCache:
    """Finished work in one folder, each part under a name of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of_task(cls, results: Path, task: str, inputs_digest: str) -> "TaskCache":
        """Of one task's unfinished work on one set of inputs; inputs_digest: of all that it depends on."""
        return cls(results / UNFINISHED / task / inputs_digest[:16])

    def get_or_compute(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The value under a name, computed now if it is not there. Called by the one rank whose work it is."""
        cached = self.get(name)
        return self.put(name, compute()) if cached is None else cached

    def get(self, name: str) -> dict[str, Any] | None:
        """The value under a name; None if there is none, or, which is reported, it was damaged."""
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                return {key: file[key] for key in file.files if key != _JSON} | json.loads(str(file[_JSON]))
        except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile):
            logger.warning(f"{path} can't be read; it is computed again")
            return None

    def put(self, name: str, value: dict[str, Any]) -> dict[str, Any]:
        """Writes a value, completely or not at all; returns it as `get` will."""
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
        """The float32 array (L, N, D) under a name, a memory map that every rank reads. All ranks call it together.

        If it is not complete, every rank's `fill(write, done)` writes its part of what a killed command did not;
        `done` holds the starts of the batches that are there. facts: written into the manifest.
        """
        file = CachedArray(self.folder, name)
        with ExitStack() as stack:  # other commands, such as another task of the same array, wait, and find it complete
            from_first(lambda: stack.enter_context(locked(file.lock, str(file.path))))
            if not from_first(file.is_complete):
                from_first(lambda: file.reserve(shape))
                done = from_first(file.noted)  # the same for all ranks: they share out what is missing
                with file.writer(PartialState().process_index) as write:
                    fill(write, done)
                PartialState().wait_for_everyone()
                from_first(lambda: file.seal(facts))
        return np.load(file.path, mmap_mode="r")

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npz"


def clear_unfinished(results: Path, task: str) -> None:
    """Deletes a task's unfinished work, that of other inputs too."""
    shutil.rmtree(results / UNFINISHED / task, ignore_errors=True)


class CachedArray:
    """A large array in one file: NAME.npy, complete once NAME.json with its digest stands beside it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path, self.lock = folder / f"{name}.npy", folder / f".{name}.npy.lock"
        self._manifest, self._notes = folder / f"{name}.json", folder / f"{name}.batches"

    def is_complete(self) -> bool:
        """Whether the file is as it was written; a damaged one is reported and removed."""
        if not self._manifest.is_file():
            return False
        try:
            promised = json.loads(self._manifest.read_text())["sha256"]
            if file_sha256(self.path) == promised:
                return True
        except (OSError, ValueError, KeyError, TypeError):
            pass
        logger.warning(f"{self.path} is not what was written; it is computed again")
        self._remove()
        return False

    def reserve(self, shape: tuple[int, ...]) -> None:
        """Creates the file, unless a killed command left it, with its space allocated: writing to a map on a full disk
        would kill the process."""
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
        """Yields `write(start, batch)`: float32 (L, B, D) to the rows start..start + B.

        What was written is flushed to disk and noted from time to time, and at the end.
        """
        mapped, fresh, noted_at = np.load(self.path, mmap_mode="r"), list[int](), time.monotonic()

        def write(start: int, batch: np.ndarray) -> None:
            # Byte by byte, not through a map: two nodes that map the same page of a network file lose one another's
            # edges.
            nonlocal noted_at
            for layer, rows in enumerate(batch):  # (B, D)
                file.seek(mapped.offset + (layer * mapped.shape[1] + start) * rows[0].nbytes)
                file.write(rows.tobytes())
            fresh.append(start)
            if time.monotonic() - noted_at > SECONDS_BETWEEN_NOTES:
                note()
                noted_at = time.monotonic()

        def note() -> None:
            file.flush()
            os.fsync(file.fileno())
            self.note(rank, fresh)
            fresh.clear()

        with self.path.open("r+b") as file:
            yield write
            note()

    def noted(self) -> set[int]:
        """Starts of the batches that are on disk."""
        lines = [line for file in self._notes.glob("rank-*") for line in file.read_text().splitlines()]
        return {int(line[:-1]) for line in lines if line.endswith(";")}  # the last line may be cut off

    def note(self, rank: int, batches: list[int]) -> None:
        """Notes batches that this rank has flushed to disk."""
        self._notes.mkdir(exist_ok=True)
        with (self._notes / f"rank-{rank}").open("a") as file:
            file.writelines(f"\n{first};" for first in batches)  # what was cut off before stands on a line of its own

    def seal(self, facts: dict[str, Any]) -> None:
        """Writes the manifest: from now on the file is complete."""
        write_json(self._manifest, facts | {"sha256": file_sha256(self.path)})
        shutil.rmtree(self._notes)

    def _remove(self) -> None:
        self._manifest.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        shutil.rmtree(self._notes, ignore_errors=True)
