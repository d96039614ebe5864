"""The files of a checkpoint. It is written to a temporary folder, committed by a rename, and retained by a rule."""

import json
import logging
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data_prep.common.files import file_sha256, flush_to_disk, json_digest, read_json, to_json
from pipeline.checkpoint.fragments import FragmentReader
from pipeline.checkpoint.run_files import PARTIAL, STEP_NAME, committed, step_folder, step_of
from pipeline.config import CheckpointConfig

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
LEFTOVER_NAME = re.compile(rf"{STEP_NAME.pattern}(\.replaced)?{re.escape(PARTIAL)}")
"""Folders of checkpoints that were never committed, or that are being deleted."""


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    """The content of checkpoint.json."""

    step: int
    images: int
    """Images seen: with `mixture`, the complete state of the data order."""
    topology: dict[str, Any]
    model: dict[str, Any]
    """The GPT2Config as a dict."""
    palette_sha256: str
    shards_digest: str
    order_fingerprint: str
    """Digest of the images that come next; compared when a run resumes."""
    probe_loss: float
    """Nats per token of the check image; compared after every load."""
    precision: str
    files: dict[str, dict[str, Any]]
    """Bytes and sha256 of each rank's file."""
    probe_tokens: int | None = None
    """Tokens of the check image; None, in older checkpoints, for a complete image."""
    probe_batch: dict[str, Any] | None = None
    """Tokens and masked pixels of the check image of a mixture, as its sets may change, or of a masked run; None for a
    next_color run of a single set, and in older masked checkpoints: an image of the set `shards_digest`."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    """Checksums of all weights and moments, compared after every load; older checkpoints have none."""
    mixture: list[dict[str, Any]] = field(default_factory=list)
    """The history of a mixture: its segments, as in train/data/mixture_history.py; a run of one set has none."""

    @property
    def set_digests(self) -> list[str]:
        """The digests of the shard sets that the run read last."""
        return [member["digest"] for member in self.mixture[-1]["members"]] if self.mixture else [self.shards_digest]


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint."""

    folder: Path
    record: CheckpointRecord

    def reader(self, *, mapped: bool = True) -> FragmentReader:
        """A reader of its weights and optimizer state; `mapped` as for FragmentReader."""
        return FragmentReader([self.folder / name for name in sorted(self.record.files)], mapped=mapped)

    def damage(self, part: int = 0, parts: int = 1) -> str | None:
        """What is wrong with the files (every parts-th, starting at part), or None. Reads the files completely."""
        for name in sorted(self.record.files)[part::parts]:
            path, recorded = self.folder / name, self.record.files[name]
            if not path.is_file():
                return f"{path} is missing"
            if path.stat().st_size != recorded["bytes"]:
                return f"{path} has {path.stat().st_size} bytes, not {recorded['bytes']}"
            if file_sha256(path) != recorded["sha256"]:
                return f"{path} is damaged (its sha256 differs)"
        return None


def rank_file(rank: int) -> str:
    """The name of a rank's file."""
    return f"rank-{rank:05d}.safetensors"


def open_checkpoint(folder: Path) -> Checkpoint:
    """Raises ValueError naming the folder if it is not a complete checkpoint."""
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist; it must be a run, or one of its checkpoints.")
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} is not a complete checkpoint; it must contain {MANIFEST}.")
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != json_digest(manifest):
        raise ValueError(f"{folder / MANIFEST} is damaged (its sha256 differs).")
    try:
        return Checkpoint(folder, CheckpointRecord(**manifest))
    except TypeError as error:
        raise ValueError(f"{folder / MANIFEST} is not a manifest of this version ({error}).") from error


def temporary_folder(checkpoints: Path, step: int) -> Path:
    """Where a checkpoint is written before it is committed."""
    return checkpoints / f"{step_folder(checkpoints, step).name}{PARTIAL}"


def begin(checkpoints: Path, step: int) -> None:
    """Deletes uncommitted checkpoints and creates the temporary folder. One rank calls it, before any rank writes."""
    for leftover in checkpoints.glob(f"*{PARTIAL}"):
        if LEFTOVER_NAME.fullmatch(leftover.name):
            discard(leftover)
    temporary_folder(checkpoints, step).mkdir(parents=True, exist_ok=True)  # one that can't be deleted may be there


def discard(folder: Path, suffix: str = PARTIAL) -> None:
    """Deletes a checkpoint; a rename uncommits it first. Of a link only the link is deleted, not where it leads.

    Logs a warning about what can't be deleted: no run may end because of an old checkpoint.
    """
    doomed = folder
    try:
        if folder.is_symlink() or not folder.is_dir():
            folder.unlink()
            return
        if not folder.name.endswith(PARTIAL):
            doomed = folder.rename(folder.with_name(folder.name + suffix))
        shutil.rmtree(doomed)
    except OSError as error:
        logger.warning(f"{doomed} can't be deleted ({error.strerror or error}); delete it once nothing uses it")


def write_rank(
    folder: Path,
    rank: int,
    tensors: dict[str, torch.Tensor],
    index: list[dict[str, Any]],
) -> dict[str, Any]:
    """Writes one rank's file and flushes it. Returns its bytes and sha256 for the manifest."""
    path = folder / rank_file(rank)
    try:
        save_file(tensors, path, metadata={"index": json.dumps(index)})
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    path.chmod(folder.stat().st_mode & 0o666)  # follow the umask: safetensors makes its files private
    flush_to_disk(path)
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def commit(folder: Path, record: CheckpointRecord) -> Path:
    """Writes the manifest and renames the folder; from then on the checkpoint is complete. One rank calls it."""
    manifest = folder / MANIFEST
    # What a run of one set does not have is omitted, so that its manifest is that of earlier versions.
    content = json.loads(to_json({key: value for key, value in asdict(record).items() if value not in (None, [])}))
    manifest.write_text(to_json(content | {"sha256": json_digest(content)}, indent=2) + "\n")
    flush_to_disk(manifest)
    flush_to_disk(folder)
    final = step_folder(folder.parent, record.step)
    if final.exists() or final.is_symlink():  # a damaged one that resume skipped
        discard(final, f".replaced{PARTIAL}")
    folder.rename(final)
    flush_to_disk(final.parent)
    return final


def retain(checkpoints: Path, rule: CheckpointConfig, newest: int) -> None:
    """Deletes checkpoints that neither `keep_last` nor `keep_every` retains.

    Checkpoints later than the `newest` step are damaged ones that a resume skipped; they are deleted too.
    """
    steps = {step_of(folder): folder for folder in committed(checkpoints)}
    valid = sorted(step for step in steps if step <= newest)
    recent, permanent = valid[-rule.keep_last :], permanent_steps(valid, rule.keep_every)
    for step, folder in steps.items():
        if step not in recent and step not in permanent:
            discard(folder)


def permanent_steps(steps: list[int], every: int) -> set[int]:
    """The first of the sorted `steps` at or after each multiple of `every`; none if it is 0.

    A save may come later than the multiple: save intervals may differ, and a skipped step delays a save.
    """
    if not every:
        return set()
    return {step for before, step in zip([0, *steps], steps, strict=False) if step // every > before // every}


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """States of this rank's random number generators, which dropout uses, as tensors of its file."""
    states = {"random_state": torch.get_rng_state()}
    if device.type == "cuda":
        states["random_state.cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(checkpoint: Checkpoint, rank: int, device: torch.device) -> None:
    """Restores this rank's random number generators; without a saved state they are unchanged."""
    name = rank_file(rank)
    if name not in checkpoint.record.files:
        return
    with safe_open(str(checkpoint.folder / name), framework="pt") as file:
        torch.set_rng_state(file.get_tensor("random_state"))
        if device.type == "cuda" and "random_state.cuda" in file.keys():  # noqa: SIM118 (no mapping)
            torch.cuda.set_rng_state(file.get_tensor("random_state.cuda"), device)
