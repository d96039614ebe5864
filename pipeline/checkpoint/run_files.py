"""Names in a run's folder, and what can be read there without importing torch: its checkpoints and its lock."""

import fcntl
import os
import re
import time
from pathlib import Path

import psutil

CONFIG_FILE = "config.yaml"
RECORD_FILE = "run.json"
LOCK_FILE = ".lock"
CHECKPOINTS_FOLDER = "checkpoints"
OWNER_FILE = "run.txt"
"""In a `checkpoint.folder`: the path of the run whose checkpoints it has."""
PARTIAL = ".partial"
STEP_NAME = re.compile(r"step-\d{8,}")
UNKNOWN_HOLDER = "unknown"
"""A holder that has not written its name yet, right after it took the lock."""


def step_folder(checkpoints: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return checkpoints / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def committed(checkpoints: Path) -> list[Path]:
    """Folders of all committed checkpoints, oldest first; files, and folders with other names, are ignored.

    Raises OSError if the folder is there and can't be listed.
    """
    if not checkpoints.is_dir():
        return []
    folders = [folder for folder in checkpoints.iterdir() if STEP_NAME.fullmatch(folder.name)]
    return sorted((folder for folder in folders if folder.is_dir()), key=step_of)


def run_of(checkpoint: Path) -> Path:
    """The run that a checkpoint's folder belongs to, also where `checkpoint.folder` lies elsewhere."""
    run, owner = checkpoint.parent.parent, checkpoint.parent / OWNER_FILE
    if not (run / RECORD_FILE).is_file() and owner.is_file():
        return Path(owner.read_text().strip())
    return run


def lock_holder(run: Path) -> str | None:
    """Who holds the run's lock, as it wrote there; None if nobody does. Raises OSError if the lock can't be tested.

    The test holds a shared lock for a moment, so whoever takes the lock tries more than once.
    """
    try:
        with (run / LOCK_FILE).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or UNKNOWN_HOLDER
    except FileNotFoundError:
        pass
    return None


def launcher_start() -> str:
    """When this process's parent, such as torchrun, started: in UTC, as the times in run.json."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(psutil.Process(os.getppid()).create_time()))
