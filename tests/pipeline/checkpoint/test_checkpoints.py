"""Damaged, half-written and forged checkpoints are never loaded; a full disk does not damage the older ones."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from data_prep.common.files import file_sha256, json_digest
from pipeline.checkpoint.format import permanent_steps, retain
from pipeline.config import CheckpointConfig
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
        ("weight", False, "was not restored correctly: the loss of the probe batch is"),
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
