"""Finished pieces of a task, kept on disk until the whole task is: a task that was killed does only what is left."""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common.files import atomic_write

UNFINISHED = ".unfinished"


class Kept:
    """The pieces of one task on one set of inputs, in a folder of their own."""

    def __init__(self, results: Path, task: str, inputs_digest: str) -> None:
        """inputs_digest: of all that the pieces depend on."""
        self._of_task = results / UNFINISHED / task
        self.folder = self._of_task / inputs_digest[:16]
        """For the state of longer pieces; write aside and rename."""

    def once(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `work` gives, or gave when it was done before: numpy arrays, and values that JSON can hold.

        Called by the rank that does the piece; `name` is its alone. A piece that can't be read is done again.
        """
        path = self.folder / f"{name}.npz"
        done = _read(path)
        if done is not None:
            return done
        value = work()
        arrays = {key: part for key, part in value.items() if isinstance(part, np.ndarray)}
        plain = json.dumps({key: part for key, part in value.items() if key not in arrays})
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays, **{_PLAIN: np.array(plain)})
        return {key: value[key] for key in arrays} | json.loads(plain)

    def clear(self) -> None:
        """Deletes the task's pieces, those of other inputs too."""
        shutil.rmtree(self._of_task, ignore_errors=True)


_PLAIN = "plain json"


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files if key != _PLAIN}
            return arrays | json.loads(str(file[_PLAIN]))
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile):
        print(f"{path} can't be read; what it held is done again", flush=True)
        return None
