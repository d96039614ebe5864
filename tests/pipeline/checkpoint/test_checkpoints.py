"""Damaged, half-written and forged checkpoints are never loaded; a full disk does not damage the older ones."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from data_prep.common.exit_codes import Failed
from data_prep.common.files import file_sha256, json_digest
from pipeline import distributed
from pipeline.checkpoint.format import Checkpoint, begin, permanent_steps, retain, write_rank
from pipeline.checkpoint.run_folder import RunFolder
from pipeline.config import CheckpointConfig
from pipeline.distributed import Ranks
from pipeline.rank_errors import is_on_all_ranks
from pipeline.train import checkpointing
from tests.pipeline.conftest import Runner


@pytest.fixture
def run_at_30(runner: Runner, finished_run: Runner) -> Runner:
    """The reference run as it stood after step 30 of 40, with checkpoints of steps 20 and 30."""
    path = runner.folder / "run"
    shutil.copytree(finished_run.folder / "reference", path)
    shutil.rmtree(path / "checkpoints/step-00000040")
    record = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(record | {"status": "running"}))
    return runner


def test_a_damaged_checkpoint_is_skipped_and_logged(run_at_30: Runner, finished_run: Runner) -> None:
    newest = run_at_30.folder / "run/checkpoints/step-00000030/rank-00001.safetensors"
    flip_a_byte(newest)
    finished = run_at_30.train("run", 2, batch__micro_size=2)
    assert finished.codes == [0, 0], "\n".join(finished.outputs)
    assert f"skipped the damaged checkpoint {newest.parent}" in finished.output
    assert "step-00000020: step 20" in finished.output
    assert run_at_30.losses("run") == finished_run.losses("reference")


def test_a_changed_manifest_and_folders_of_other_names_are_passed_over(run_at_30: Runner, finished_run: Runner) -> None:
    newest = run_at_30.folder / "run/checkpoints/step-00000030"
    shutil.copytree(newest, newest.with_name("step-00000030-backup"))
    manifest = newest / "checkpoint.json"
    manifest.write_text(manifest.read_text().replace('"step": 30', '"step": 50'))
    finished = run_at_30.train("run", 2, batch__micro_size=2)
    assert finished.codes == [0, 0], "\n".join(finished.outputs)
    assert f"skipped the damaged checkpoint {newest}: {manifest} is damaged" in finished.output
    assert "step-00000020: step 20" in finished.output
    assert run_at_30.losses("run") == finished_run.losses("reference")


def test_a_save_that_came_late_is_as_permanent_as_its_multiple() -> None:
    assert permanent_steps([5, 10, 15, 21, 25, 40, 45], 20) == {21, 40}
    assert permanent_steps([21, 40, 45, 63], 20) == {21, 40, 63}
    assert permanent_steps([5, 10], 0) == set()


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def test_without_a_complete_checkpoint_the_run_does_not_start_from_scratch(run_at_30: Runner) -> None:
    for folder in (run_at_30.folder / "run/checkpoints").iterdir():
        with (folder / "rank-00000.safetensors").open("r+b") as file:
            file.truncate(1000)
    finished = run_at_30.train("run", 2, batch__micro_size=2)
    assert set(finished.codes) == {2}
    assert "none is complete" in finished.output
    assert "Traceback" not in finished.output


@pytest.mark.parametrize(
    ("state", "with_checksums", "message"),
    [
        ("weight", True, "was not restored correctly: the checksums of weight differ"),
        ("exp_avg", True, "was not restored correctly: the checksums of exp_avg differ"),
        pytest.param(
            "exp_avg_sq",
            True,
            "was not restored correctly: the checksums of exp_avg_sq differ",
            marks=pytest.mark.slow,
        ),
        ("weight", False, "was not restored correctly: the loss of the check image is"),
    ],
)
def test_a_forged_file_with_a_valid_digest_is_found(
    run_at_30: Runner, state: str, with_checksums: bool, message: str
) -> None:
    """The checksums find any change; the probe also finds changed weights."""
    folder = run_at_30.folder / "run/checkpoints/step-00000030"
    path, manifest = folder / "rank-00000.safetensors", json.loads((folder / "checkpoint.json").read_text())
    metadata = header(path)
    tensors = load_file(path)
    name = next(key for key in tensors if key.startswith("transformer.wte") and key.endswith(f".{state}"))
    if with_checksums:
        tensors[name][3] *= 1.01
    else:
        tensors[name] += 0.05 * torch.randn_like(tensors[name])
        del manifest["fingerprints"]
    save_file(tensors, path, metadata=metadata)
    manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    del manifest["sha256"]
    (folder / "checkpoint.json").write_text(json.dumps(manifest | {"sha256": json_digest(manifest)}))
    finished = run_at_30.train("run", 2, batch__micro_size=2)
    assert set(finished.codes) == {2}
    assert message in finished.output


def header(path: Path) -> dict[str, str]:
    with safe_open(str(path), framework="pt") as file:
        return dict(file.metadata())


def test_a_half_written_checkpoint_is_cleared_and_never_resumed(run_at_30: Runner) -> None:
    checkpoints = run_at_30.folder / "run/checkpoints"
    shutil.copytree(checkpoints / "step-00000030", checkpoints / "step-00000035.partial")
    finished = run_at_30.train("run", 2, batch__micro_size=2)
    assert finished.codes == [0, 0], "\n".join(finished.outputs)
    assert "step-00000030: step 30" in finished.output
    assert not list(checkpoints.glob("*.partial"))


def test_the_newest_and_the_permanent_ones_are_retained(tmp_path: Path) -> None:
    for step in range(10, 130, 10):
        (tmp_path / f"step-{step:08d}").mkdir()
    retain(tmp_path, CheckpointConfig(every_steps=10, keep_last=2, keep_every=50), newest=120)
    assert sorted(int(path.name[5:]) for path in tmp_path.iterdir()) == [50, 100, 110, 120]


def test_damaged_ones_that_a_resume_passed_over_do_not_push_the_new_one_out(tmp_path: Path) -> None:
    for step in (10, 15, 30, 40):
        (tmp_path / f"step-{step:08d}").mkdir()
    retain(tmp_path, CheckpointConfig(every_steps=5, keep_last=2, keep_every=10), newest=15)
    assert sorted(int(path.name[5:]) for path in tmp_path.iterdir()) == [10, 15]


def test_a_checkpoint_that_was_archived_and_linked_loses_only_its_link(tmp_path: Path) -> None:
    folder, archived = tmp_path / "checkpoints", tmp_path / "archive/step-00000010"
    archived.mkdir(parents=True)
    (archived / "rank-00000.safetensors").touch()
    for step in (20, 30):
        (folder / f"step-{step:08d}").mkdir(parents=True)
    (folder / "step-00000010").symlink_to(archived)
    (folder / "step-00000005").symlink_to("/nowhere")
    retain(folder, CheckpointConfig(keep_last=2), newest=30)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000005", "step-00000020", "step-00000030"]
    assert (archived / "rank-00000.safetensors").is_file()


def test_what_cannot_be_deleted_is_left_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As of a folder with a mount point, or with a file that another node still has open on NFS."""
    for step in (10, 20, 30):
        (tmp_path / f"step-{step:08d}").mkdir()
    delete = shutil.rmtree

    def busy(path: Path) -> None:
        if "step-00000010" in str(path):
            raise OSError(16, "Device or resource busy")
        delete(path)

    monkeypatch.setattr(shutil, "rmtree", busy)
    retain(tmp_path, CheckpointConfig(keep_last=1), newest=30)
    begin(tmp_path, 40)
    begin(tmp_path, 10)  # again, after the run resumed from an earlier checkpoint
    left = ["step-00000010.partial", "step-00000030"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    assert f"{tmp_path / left[0]} can't be deleted (Device or resource busy)" in caplog.text


def test_files_of_others_in_the_folder_are_left(tmp_path: Path) -> None:
    (tmp_path / "step-00000005").touch()
    (tmp_path / "copy.partial").touch()
    (tmp_path / "step-00000010.partial").mkdir()
    (tmp_path / "step-00000010.replaced.partial").mkdir()
    begin(tmp_path, 20)
    retain(tmp_path, CheckpointConfig(keep_last=1), newest=20)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "copy.partial",
        "step-00000005",
        "step-00000020.partial",
    ]


@pytest.mark.parametrize("umask", [0o002, 0o077])
def test_a_ranks_file_follows_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        (tmp_path / "step").mkdir()
        write_rank(tmp_path / "step", 0, {"a": torch.zeros(1)}, [])
    finally:
        os.umask(before)
    assert (tmp_path / "step/rank-00000.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


RANKS = Ranks(0, 1, 0, torch.device("cpu"))


@pytest.mark.parametrize(
    ("error", "tries", "message"),
    [
        (
            PermissionError(13, "Permission denied", "FILE"),
            1,
            "FILE can't be read (Permission denied); make it readable",
        ),
        (OSError(5, "Input/output error", "FILE"), 3, "FILE can't be read (Input/output error)"),
        (OSError(116, "Stale file handle"), 3, "step-00000040 can't be read (Stale file handle)"),
    ],
)
def test_a_file_that_cannot_be_read_is_not_taken_for_damaged(
    error: OSError, tries: int, message: str, finished_run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, calls = finished_run.folder / "reference/checkpoints/step-00000040", []

    def fails(*arguments: object) -> None:
        calls.append(arguments)
        raise error

    monkeypatch.setattr(checkpointing, "READ_PAUSE", 0)
    monkeypatch.setattr(Checkpoint, "damage", fails)
    kind = ValueError if isinstance(error, PermissionError) else checkpointing.Unreadable  # exit codes 2 and 1
    with pytest.raises(kind, match=re.escape(message)):
        checkpointing._inspect(folder, RANKS)
    assert len(calls) == tries


def test_ranks_end_with_code_1_if_the_file_system_of_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank's message is exchanged; this rank read all files."""
    answers = iter([[None, None], [None, "FILE can't be read"]])
    monkeypatch.setattr(distributed, "gather", lambda value: next(answers))
    monkeypatch.setattr(checkpointing, "_inspect", lambda folder, ranks: (None, None))
    with pytest.raises(Failed, match="FILE can't be read") as raised:
        checkpointing.verified(Path("step-00000040"), RANKS)
    assert is_on_all_ranks(raised.value)


def test_checkpoints_that_are_all_damaged_are_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "step-00000040").mkdir()
    monkeypatch.setattr(distributed, "gather", lambda value: [value])
    with pytest.raises(ValueError, match="1 checkpoints, and none is complete") as raised:
        checkpointing.newest_complete(tmp_path, RANKS)
    assert is_on_all_ranks(raised.value)


def test_a_checkpoint_linked_by_a_relative_path_can_be_set_aside(tmp_path: Path) -> None:
    """It was moved elsewhere, and a link was left in its place."""
    run, moved = RunFolder(tmp_path / "run"), tmp_path / "archive/step-00000040"
    (run.checkpoints / "step-00000020").mkdir(parents=True)
    moved.mkdir(parents=True)
    (run.checkpoints / "step-00000040").symlink_to("../../archive/step-00000040")
    checkpointing._set_aside(run, 20)
    [aside] = run.checkpoints.glob("set-aside-*")
    assert (aside / "step-00000040").resolve() == moved
    assert moved.is_dir()
    assert [path.name for path in run.checkpoints.glob("step-*")] == ["step-00000020"]


def test_a_file_system_that_recovers_costs_a_second_attempt(
    finished_run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = [OSError(5, "Input/output error"), OSError(116, "Stale file handle")]
    damage = Checkpoint.damage

    def recovers(checkpoint: Checkpoint, *share: int) -> str | None:
        if errors:
            raise errors.pop()
        return damage(checkpoint, *share)

    monkeypatch.setattr(checkpointing, "READ_PAUSE", 0)
    monkeypatch.setattr(Checkpoint, "damage", recovers)
    checkpoint, found = checkpointing._inspect(finished_run.folder / "reference/checkpoints/step-00000040", RANKS)
    assert checkpoint is not None
    assert (checkpoint.record.step, found) == (40, None)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_ends_in_a_sentence_and_keeps_the_older_checkpoint(runner: Runner) -> None:
    disk = runner.folder / "run"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine does not allow mounts")
    try:
        finished = runner.train("run", 2, batch__micro_size=2)
        checkpoints = sorted(path.name for path in (disk / "checkpoints").iterdir() if ".partial" not in path.name)
    finally:
        subprocess.run(["umount", disk], check=True)
    assert set(finished.codes) == {2}, finished.output
    assert "No space left" in finished.output
    assert "Traceback" not in "".join(finished.outputs)
    assert checkpoints
    assert checkpoints[-1] != "step-00000040"
