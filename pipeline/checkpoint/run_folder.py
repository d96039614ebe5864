"""The run folder: its lock, its resolved configuration, and run.json, the record of its starts and status."""

import logging
import os
import platform
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
import torch
import yaml

from data_prep.common.files import atomic_write, read_json, take_lock, write_json
from data_prep.shards.addresses import hide_secrets
from pipeline.checkpoint.format import Checkpoint, open_checkpoint
from pipeline.checkpoint.metrics_log import METRICS_FILE, read_last_row
from pipeline.checkpoint.mixture_record import check_shards, describe_sets, made_with, names_of
from pipeline.checkpoint.run_files import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    LOCK_FILE,
    OWNER_FILE,
    RECORD_FILE,
    UNKNOWN_HOLDER,
    committed,
    launcher_start,
    step_of,
)
from pipeline.config import TrainConfig, changed_keys, to_dict
from pipeline.probe_config import ProbeConfig
from pipeline.training_set import TrainingSets

logger = logging.getLogger(__name__)

PALETTE_FILE = "palette.npy"
PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "safetensors")
FIXED_KEYS = ("seed", "model.", "objective.", "data.flip", "data.reflect_crop")
"""Keys that can't change when a run resumes: they determine the model and the data order."""
START_KEYS = "start."
"""Keys that can't change once a run has a checkpoint: they say what it started from."""
LOCK_WAIT_FACTOR = 3
"""How many times health.hang_minutes a job waits for the lock: until then, the watchdog has ended waiting ranks."""
HELD_BY_JOB = ", SLURM job "
"""Precedes a job's id in the lock file."""
LOCK_ATTEMPTS, LOCK_PAUSE = 3, 0.05
"""How often, and with which pause in seconds, a lock is tried: `status` tests it for a moment."""
JOB_FILES = ("logs", "failures.jsonl", "accidents.jsonl")
"""Files that job scripts write to the folder before the run starts."""
Status = Literal["running", "stopped", "failed", "finished"]


class RunFolder:
    """A training run on disk. Only rank 0 writes to it, except to checkpoints."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / CHECKPOINTS_FOLDER
        self._lock: TextIO | None = None
        self._record: dict[str, Any] = {}

    def check(self, config: TrainConfig, sets: TrainingSets, resume_from: int | None = None) -> None:
        """Raises ValueError or OSError if this configuration can't start or resume in the folder. Writes nothing.

        resume_from: the step of the checkpoint to resume from; None for the newest.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--run is {self.path}, which is a file; it must be a new folder or the folder of a run.")
        parent = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise ValueError(f"--run is {self.path}, but {parent} is not writable; name another folder.")
        if (self.path / CONFIG_FILE).exists():
            self._check_fixed_keys(config)
            record = self._read_record() if (self.path / RECORD_FILE).exists() else None
            if checkpoint := self._checkpoint(resume_from):
                check_shards(made_with(checkpoint.record), sets, checkpoint.folder)
            elif record:
                check_shards(record["shards"], sets, self.path / RECORD_FILE)
            self._check_saved()
            self._check_step(config, resume_from)
        elif resume_from is not None:
            raise ValueError(f"--resume_from is {resume_from}, but {self.path} is a new run; remove --resume_from.")
        elif self.path.is_dir() and any(_is_foreign(child) for child in self.path.iterdir()):
            raise ValueError(f"--run is {self.path}, which has other files and no {CONFIG_FILE}; name a new folder.")
        self._check_checkpoint_folder(config.checkpoint.folder)

    def _check_fixed_keys(self, config: TrainConfig) -> None:
        fixed = (*FIXED_KEYS, START_KEYS) if committed(self.checkpoints) else FIXED_KEYS
        for key, (old, new) in changed_keys(self._earlier_config(), to_dict(config)).items():
            if key.startswith(fixed) and not (key == "start.path" and self._is_recorded_origin(new)):
                old, new = ("null" if value is None else value for value in (old, new))
                raise ValueError(
                    f"{key} is {new}, but {self.path} was started with {old}; set it to {old}, or name a new --run."
                )

    def _is_recorded_origin(self, path: str | None) -> bool:
        """Whether start.path names the recorded origin, as from another working directory."""
        origin = (self._read_record() if (self.path / RECORD_FILE).exists() else {}).get("origin")
        return bool(path and origin and Path(path).resolve() == Path(origin["path"]).resolve())

    def _earlier_config(self) -> dict[str, Any]:
        path = self.path / CONFIG_FILE
        try:
            earlier = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is damaged: it is not YAML; restore it from a copy.") from error
        if not isinstance(earlier, dict):
            raise ValueError(f"{path} is damaged: it has no keys and values; restore it from a copy.")
        earlier.setdefault("data", {}).setdefault("reflect_crop", 0)  # runs from before this key did not crop
        earlier.setdefault("start", {"path": None, "moments": False, "position": False})  # they started from nothing
        earlier.setdefault("deterministic", False)  # nor were they asked to be deterministic
        earlier.setdefault("parallel", {}).setdefault("communication", "fp32")  # bf16 was not offered
        earlier.setdefault("ema", {}).setdefault("decay", 0.0)  # nor was an average of the weights
        earlier.setdefault("probe", asdict(ProbeConfig()))  # nor were they probed
        return earlier

    def _checkpoint(self, resume_from: int | None) -> Checkpoint | None:
        """The one to resume from, whose sets may be others than those of a later start; None if none can be read."""
        for folder in reversed(committed(self.checkpoints)):
            if resume_from in (None, step_of(folder)):
                with suppress(ValueError, OSError):
                    return open_checkpoint(folder)
        return None

    def names_of_sets(self, resume_from: int | None) -> dict[str, str]:
        """The names by digest of the sets of a mixture, as recorded in the checkpoint to resume from, or in run.json.

        Raises as `check`.
        """
        if checkpoint := self._checkpoint(resume_from):
            return names_of(checkpoint.record.mixture)
        shards = self._read_record()["shards"] if (self.path / RECORD_FILE).exists() else {}
        return {one["digest"]: one["name"] for one in shards.get("mixture", [])}

    def finished_steps(self) -> int:
        """The steps of a finished run; 0 for an unfinished one."""
        record = self._read_record() if (self.path / RECORD_FILE).exists() else {}
        return int(record.get("step", 0)) if record.get("status") == "finished" else 0

    def _check_saved(self) -> None:
        """Raises ValueError if the run has saved a checkpoint and now has none: it would begin at step 1 again."""
        if committed(self.checkpoints):
            return
        record = self._read_record() if (self.path / RECORD_FILE).exists() else {}
        row = read_last_row(self.path / METRICS_FILE, "loss") or {"step": 0}
        saved = int(record.get("checkpoint", 0) or record.get("step", 0))
        if "checkpoint" not in record:  # earlier versions did not record saves: one was due after every_steps
            every_steps = self._earlier_config().get("checkpoint", {}).get("every_steps", 0)
            saved = max(saved, row["step"] if row["step"] > every_steps else 0)
        if saved:
            leads = f" (a link to {self.checkpoints.readlink()})" if self.checkpoints.is_symlink() else ""
            raise ValueError(
                f"{self.path} has trained {max(saved, row['step']):,} steps, but {self.checkpoints}{leads} has no "
                f"checkpoint; mount their disk or restore one from a copy, or name a new --run."
            )

    def _check_step(self, config: TrainConfig, resume_from: int | None) -> None:
        """Raises ValueError if `resume_from` has no checkpoint, or if the run has more steps than schedule.steps."""
        steps = [step_of(folder) for folder in committed(self.checkpoints)]
        if resume_from is not None and resume_from not in steps:
            found = ", ".join(map(str, steps)) or "none"
            raise ValueError(
                f"--resume_from is {resume_from}, but {self.checkpoints} has none of this step; it has {found}."
            )
        step = max(steps, default=0) if resume_from is None else resume_from
        if step > config.schedule.steps and (resume_from is not None or not self.finished_steps()):
            raise ValueError(
                f"schedule.steps is {config.schedule.steps}, but {self.path} resumes at step {step}; set it to at "
                f"least {step}, or resume from an earlier checkpoint with --resume_from."
            )

    def _check_checkpoint_folder(self, wanted: str | None) -> None:
        """Raises ValueError if the run's checkpoints can't be in checkpoint.folder, or are elsewhere already."""
        if wanted is None or self._is_unchanged_link(wanted):
            return
        folder = Path(wanted).absolute()
        if self.checkpoints.is_symlink() or self.checkpoints.exists():
            if self.checkpoints.resolve() != folder.resolve():
                raise ValueError(
                    f"checkpoint.folder is {wanted}, but the checkpoints of {self.path} are in "
                    f"{self.checkpoints.resolve()}; leave it out, or move them there and make {self.checkpoints} a "
                    f"link to it."
                )
        elif folder.exists() and not folder.is_dir():
            raise ValueError(f"checkpoint.folder is {wanted}, which is a file; it must be a folder for this run alone.")
        elif folder.exists() and any(folder.iterdir()):
            raise ValueError(
                f"checkpoint.folder is {wanted}, which has files already; name an empty or new folder, for this run "
                f"alone."
            )
        else:
            parent = next(parent for parent in (folder, *folder.parents) if parent.exists())
            if not parent.is_dir() or not os.access(parent, os.W_OK):
                raise ValueError(f"checkpoint.folder is {wanted}, but {parent} is not writable; name another folder.")

    def _is_unchanged_link(self, wanted: str) -> bool:
        """Whether the last start had the same checkpoint.folder: a relative one may be of another working directory."""
        if not self.checkpoints.is_symlink() or not (self.path / CONFIG_FILE).exists():
            return False
        return bool(self._earlier_config().get("checkpoint", {}).get("folder") == wanted)

    def _link_checkpoints(self, wanted: str | None) -> None:
        """Makes `checkpoints` a link to checkpoint.folder, where the run's path is written down."""
        if wanted is None or Path(wanted).absolute() == self.checkpoints.absolute():
            return
        if not self.checkpoints.is_symlink() and not self.checkpoints.exists():
            self.checkpoints.symlink_to(Path(wanted).absolute())
        folder = self.checkpoints.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / OWNER_FILE).write_text(f"{self.path.resolve()}\n")

    def changes(self, config: TrainConfig) -> dict[str, tuple[Any, Any]]:
        """Changes of the configuration since the last start: (old, new) by key."""
        return changed_keys(self._earlier_config(), to_dict(config)) if (self.path / CONFIG_FILE).exists() else {}

    def _read_record(self) -> dict[str, Any]:
        record = None
        with suppress(ValueError):
            record = read_json(self.path / RECORD_FILE)
        if not isinstance(record, dict) or not isinstance(record.get("shards"), dict):
            raise ValueError(
                f"{self.path / RECORD_FILE} is damaged: it is not a record of a run; restore it from a copy, or delete "
                f"it: the next start writes a new one."
            )
        return record

    def open(self, config: TrainConfig, sets: TrainingSets, command: list[str], ranks: int) -> None:
        """Creates or reopens the folder, and logs the changes of the configuration since the last start.

        Raises ValueError if another process trains in it. A SLURM job waits for ranks of an earlier job that still run
        on a lost node, until their watchdog ends them.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock(LOCK_WAIT_FACTOR * 60 * config.health.hang_minutes)
        for leftover in self.path.glob(".*.partial"):
            with suppress(OSError):  # a folder, or another user's
                leftover.unlink()
        if (self.path / RECORD_FILE).exists():
            self._record = self._read_record()
        self._link_checkpoints(config.checkpoint.folder)
        changes = self.changes(config)
        with atomic_write(self.path / CONFIG_FILE) as temporary:
            temporary.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
        with atomic_write(self.path / PALETTE_FILE) as temporary, temporary.open("wb") as file:
            np.save(file, sets.palette)
        start = {
            "time": _now(),
            "command": [hide_secrets(word) for word in command],
            "ranks": ranks,
            "code": code_version(),
            "packages": {name: version(name) for name in PACKAGES},
            "hardware": hardware(),
            "changes": {key: [_masked(value) for value in pair] for key, pair in changes.items()},
        }
        self._record["shards"] = describe_sets(sets)
        if (own := config.probe.shards) is not None:
            self._record["probe_shards"] = own if "://" in own else str(Path(own).resolve())
        self._record["starts"] = [*self._record.get("starts", []), start]
        steps = [step_of(folder) for folder in committed(self.checkpoints)]
        self._record.setdefault("checkpoint", max(steps, default=0))
        self.note("running")
        count = "1 checkpoint" if len(steps) == 1 else f"{len(steps)} checkpoints"
        saved = f"{count}, the newest of step {steps[-1]}" if steps else "no checkpoint yet"
        logger.info(f"run {self.path.resolve()}: start {len(self._record['starts'])}, {saved}")
        for key, (old, new) in changes.items():
            logger.warning(hide_secrets(f"changed since the last start: {key} was {old} and is now {new}"))

    def note(self, status: Status, **facts: Any) -> None:
        """Writes the status, and other facts about the run, to run.json."""
        self._record.pop("error", None)
        self._record |= {"status": status, "updated": _now(), **facts}
        write_json(self.path / RECORD_FILE, self._record)

    def note_failure(self, error: BaseException) -> None:
        """Writes the error to run.json, if this rank holds the run's lock and the disk is writable."""
        if self._record.get("status") == "running":
            with suppress(OSError):
                self.note("failed", error=f"{type(error).__name__}: {error}")

    def resume_step(self, wanted: int | None) -> int | None:
        """The step of --resume_from; None if this job has resumed from it before, and was restarted since."""
        record = self._read_record() if wanted is not None and (self.path / RECORD_FILE).exists() else {}
        restarted = "SLURM_ARRAY_JOB_ID" in os.environ or any(
            os.environ.get(name, "0") not in ("", "0") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
        )
        resumed = record.get("resumed") or {}
        same_job = resumed.get("job") == _job() and (_job() or resumed.get("time", "") >= launcher_start())
        return None if restarted and same_job and resumed.get("step") == wanted else wanted

    def note_resumed(self, step: int) -> None:
        """Records that the run resumed from the checkpoint of --resume_from, as this job's restarts must not repeat."""
        self.note("running", step=step, checkpoint=step, resumed={"step": step, "job": _job(), "time": _now()})

    def recall(self, key: str) -> Any:
        """A fact that was noted earlier, or None."""
        return self._record.get(key)

    def close(self) -> None:
        """Releases the lock."""
        if self._lock is not None:
            self._lock.close()

    def _take_lock(self, timeout: float) -> None:
        """timeout: seconds for which a SLURM job waits for the ranks of another job, or of its own earlier start."""
        self._lock, end, logged = (self.path / LOCK_FILE).open("a+"), time.monotonic() + timeout, False
        number = _job()
        while not _locked(self._lock):
            self._lock.seek(0)
            holder = self._lock.read().strip() or UNKNOWN_HOLDER
            waits = number is not None and (HELD_BY_JOB in holder or holder == UNKNOWN_HOLDER)
            waits = waits and not _same_start(holder)
            if not waits or time.monotonic() > end:
                raise ValueError(f"{self.path} is being trained by another process ({holder}); wait for it or stop it.")
            if not logged:
                logger.warning(
                    f"{holder} still holds the lock of the run, as ranks on a lost node do until their watchdog ends "
                    f"them; waiting up to {timeout / 60:g} minutes"
                )
            logged = True
            time.sleep(1)
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {platform.node()}{HELD_BY_JOB + number if number else ''}")
        self._lock.flush()


def _same_start(holder: str) -> bool:
    """Whether the holder of the lock started in this allocation: the job was not requeued, so it still runs."""
    job, in_array = os.environ.get("SLURM_JOB_ID"), "SLURM_ARRAY_JOB_ID" in os.environ
    return holder.endswith(f"{HELD_BY_JOB}{job}") and not in_array and os.environ.get("SLURM_RESTART_COUNT", "0") == "0"


def _job() -> str | None:
    """The id of the SLURM job, or of its array; None outside of one."""
    return os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")


def _masked(value: Any) -> Any:
    """A value of the configuration without the secrets of URLs."""
    if isinstance(value, list):
        return [_masked(each) for each in value]
    if isinstance(value, dict):
        return {key: _masked(each) for key, each in value.items()}
    return hide_secrets(value) if isinstance(value, str) else value


def _locked(file: TextIO) -> bool:
    for _ in range(LOCK_ATTEMPTS):
        if take_lock(file):
            return True
        time.sleep(LOCK_PAUSE)
    return False


def _is_foreign(path: Path) -> bool:
    """Whether a file in a folder without a run is neither hidden nor written by the job scripts."""
    return not path.name.startswith(".") and path.name not in JOB_FILES


def code_version() -> str:
    """The commit of this checkout, with -dirty if files differ from it; unknown if it has no repository of its own."""
    root = Path(__file__).parents[2]
    try:
        top = _git(root, "rev-parse", "--show-toplevel")
        if Path(top).resolve() != root.resolve():  # a copy without .git within another repository
            return "unknown"
        return _git(root, "describe", "--always", "--dirty", "--abbrev=40")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def hardware() -> dict[str, Any]:
    """The hardware and system of this rank."""
    return {
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": sys.version.split()[0],
    }


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
