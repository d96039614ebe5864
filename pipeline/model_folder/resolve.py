"""Finds the model that a user names: a model folder, a run, a checkpoint, or a name on a hub."""

import shutil
from pathlib import Path

from data_prep.common.files import file_sha256, locked
from pipeline.hub import HUB, pull
from pipeline.weights.model_files import model_digest

EXPORTED_FOLDER = "exported"
MADE_FROM = ".made_from"
"""A file in an exported folder: the sha256 of the checkpoint's manifest, which has the digests of all its files, and
the digest of the model that was written, so that damage to the exported files is noticed."""


def model_folder(path: Path) -> Path:
    """The model folder that `path` names; a checkpoint, or the newest of a run, is exported into the run first.

    hub:ORG/NAME or hub:ORG/NAME@REVISION is downloaded into the cache. Raises ValueError for anything else.
    """
    if str(path).startswith(HUB):
        return pull(str(path).removeprefix(HUB))
    if (path / "config.json").is_file():
        return path
    if not (path / "checkpoints").is_dir() and not (path / "checkpoint.json").is_file():
        raise ValueError(f"{path} is not a model; give a model folder, a run, a run's checkpoint, or {HUB}ORG/NAME.")
    from pipeline.checkpoint.run_files import run_of
    from pipeline.model_folder.export import export, find_checkpoint

    checkpoint = find_checkpoint(path)
    folder = run_of(checkpoint.folder) / EXPORTED_FOLDER / checkpoint.folder.name
    digest = file_sha256(checkpoint.folder / "checkpoint.json")
    if _is_exported(folder, digest):
        return folder
    with locked(
        folder.parent / ".lock", str(folder)
    ):  # the jobs of an array start from one checkpoint at the same time
        if not _is_exported(folder, digest):
            for leftover in folder.parent.glob(f".{folder.name}.*.partial"):  # of a killed export
                shutil.rmtree(leftover)
            export(checkpoint, folder)
            (folder / MADE_FROM).write_text(_made_from(folder, digest))
    return folder


def _is_exported(folder: Path, checkpoint_digest: str) -> bool:
    """Whether a folder has what was exported from this checkpoint, unchanged.

    Earlier versions recorded only the checkpoint; they stay as they are, since results name the digest of the model.
    """
    made_from = (folder / MADE_FROM).read_text() if (folder / MADE_FROM).is_file() else None
    return made_from == checkpoint_digest or made_from == _made_from(folder, checkpoint_digest)


def _made_from(folder: Path, checkpoint_digest: str) -> str:
    return f"{checkpoint_digest} {model_digest(folder)}"
