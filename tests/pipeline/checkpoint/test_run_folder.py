"""A run's folder: what is refused before a start, where its checkpoints are, who holds its lock, its code's version."""

import errno
import fcntl
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_prep.common.files import json_digest, locked
from pipeline.checkpoint import run_folder
from pipeline.checkpoint.metrics_log import drop_rows_after
from pipeline.checkpoint.run_files import committed, lock_holder, run_of
from pipeline.checkpoint.run_folder import RunFolder, code_version
from pipeline.config import CheckpointConfig, DataConfig, MixtureEntry, ModelConfig, TrainConfig
from pipeline.operate.status import read_status
from pipeline.schedule import ScheduleConfig
from pipeline.training_set import TrainingSets, open_training_sets
from tests.pipeline.train.data.mixture_sets import RESOLUTION, write_numbered_set


@pytest.fixture(scope="module")
def sets(shards: Path) -> TrainingSets:
    return open_training_sets(replace(configured(), data=DataConfig(shards=str(shards))))


def configured(steps: int = 40, folder: str | None = None) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(layers=1, width=32, heads=2, resolution=8),
        data=DataConfig(shards="set"),
        schedule=ScheduleConfig(steps=steps, warmup_steps=0),
        checkpoint=CheckpointConfig(every_steps=10, folder=folder),
    )


@pytest.fixture
def trained(tmp_path: Path, sets: TrainingSets) -> Callable[..., Path]:
    """Makes a run that was killed after 35 steps, with these checkpoints."""

    def make(*steps: int, folder: str | None = None, status: Any = "running") -> Path:
        run = RunFolder(tmp_path / "run")
        run.check(configured(folder=folder), sets)
        run.open(configured(folder=folder), sets, [], 1)
        rows = ({"step": step, "images": step, "loss": 2.0, "applied": True} for step in range(1, 36))
        (run.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for step in steps:
            (run.checkpoints / f"step-{step:08d}").mkdir(parents=True)
        run.note(status, checkpoint=max(steps, default=0))
        run.close()
        return run.path

    return make


def test_a_killed_run_whose_checkpoints_are_gone_is_refused(trained: Callable[..., Path], sets: TrainingSets) -> None:
    """Its disk may be missing; from step 1 it would erase its metrics and samples."""
    run = trained(10, 20, 30)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ValueError, match=r"has trained 35 steps, but .*/checkpoints has no checkpoint; mount"):
        RunFolder(run).check(configured(), sets)
    (run / "checkpoints").symlink_to("/nowhere/disk")
    with pytest.raises(ValueError, match=r"checkpoints \(a link to /nowhere/disk\) has no checkpoint"):
        RunFolder(run).check(configured(), sets)


@pytest.mark.parametrize(("every_steps", "refused"), [(10, True), (50, False)])
def test_of_an_earlier_version_the_interval_shows_a_save(
    every_steps: int, refused: bool, trained: Callable[..., Path], sets: TrainingSets
) -> None:
    run = trained()
    record = json.loads((run / "run.json").read_text())
    del record["checkpoint"]
    (run / "run.json").write_text(json.dumps(record))
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("every_steps: 10", f"every_steps: {every_steps}", 1))
    if refused:
        with pytest.raises(ValueError, match="has trained 35 steps"):
            RunFolder(run).check(configured(), sets)
    else:
        RunFolder(run).check(configured(), sets)


def test_a_run_killed_before_its_first_save_starts_again(trained: Callable[..., Path], sets: TrainingSets) -> None:
    RunFolder(trained()).check(configured(), sets)


def test_fewer_steps_than_the_run_has_are_refused(trained: Callable[..., Path], sets: TrainingSets) -> None:
    run = RunFolder(trained(10, 30))
    with pytest.raises(ValueError, match=r"schedule.steps is 20, but .* resumes at step 30; set it to at least 30"):
        run.check(configured(steps=20), sets)
    run.check(configured(steps=30), sets)
    run.check(configured(steps=20), sets, resume_from=10)
    with pytest.raises(ValueError, match=r"--resume_from is 20, but .* has none of this step; it has 10, 30"):
        run.check(configured(), sets, resume_from=20)
    with pytest.raises(ValueError, match=r"--resume_from is 20, but .* is a new run; remove --resume_from"):
        RunFolder(run.path.parent / "new").check(configured(), sets, resume_from=20)


def test_a_restarted_job_does_not_resume_from_the_earlier_step_again(
    trained: Callable[..., Path], sets: TrainingSets, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(trained(10, 30))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run.resume_step(10) == 10, "its first start ended before it resumed"
    run.open(configured(), sets, [], 1)
    run.note_resumed(10)
    run.close()
    assert run.resume_step(10) is None
    assert run.resume_step(30) == 30
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    assert run.resume_step(10) == 10, "another job is a new request"


def test_a_launcher_that_restarts_its_ranks_resumes_from_the_earlier_step_once(
    trained: Callable[..., Path], sets: TrainingSets, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(trained(10, 30))
    monkeypatch.setattr(run_folder, "launcher_start", lambda: "2026-01-31T12:00:00Z")
    run.open(configured(), sets, [], 1)
    run.note_resumed(10)
    run.close()
    assert run.resume_step(10) == 10, "a first start"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert run.resume_step(10) is None
    monkeypatch.setattr(run_folder, "launcher_start", lambda: "2126-01-31T12:00:00Z")
    assert run.resume_step(10) == 10, "another launcher is a new request"


def test_a_run_that_went_back_to_an_earlier_step_shows_that_step(
    trained: Callable[..., Path], sets: TrainingSets
) -> None:
    run = RunFolder(trained(10, 30))
    run.open(configured(), sets, [], 1)
    run.note("stopped", step=35)
    drop_rows_after(run.path / "metrics.jsonl", 10)
    run.note_resumed(10)
    run.close()
    assert read_status(run.path).step == 10


def test_secrets_of_changed_urls_are_not_recorded(trained: Callable[..., Path], sets: TrainingSets) -> None:
    run = RunFolder(trained())
    config = replace(configured(), data=DataConfig(shards="https://user:secret@host/set?token=secret"))
    run.open(config, sets, [], 1)
    run.close()
    record = (run.path / "run.json").read_text()
    assert json.loads(record)["starts"][-1]["changes"]["data.shards"] == ["set", "https://host/set?..."]
    assert "secret" not in record


def test_checkpoints_may_be_on_another_disk(
    trained: Callable[..., Path], sets: TrainingSets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = trained(10, 20, folder="disk/saves")
    assert sorted(path.name for path in (tmp_path / "disk/saves").glob("step-*")) == ["step-00000010", "step-00000020"]
    assert committed(run / "checkpoints") == [run / f"checkpoints/step-{step:08d}" for step in (10, 20)]
    for folder in (run / "checkpoints", tmp_path / "disk/saves"):
        assert run_of(folder / "step-00000010") == run
    monkeypatch.chdir("/")
    for again in ("disk/saves", None, str(tmp_path / "disk/saves")):
        RunFolder(run).check(configured(folder=again), sets)
    with pytest.raises(ValueError, match=rf"checkpoint.folder is /elsewhere, but .* in {tmp_path}/disk/saves; leave"):
        RunFolder(run).check(configured(folder="/elsewhere"), sets)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: (folder / "other").mkdir(parents=True), "which has files already; name an empty or new folder"),
        (lambda folder: folder.touch(), "which is a file"),
    ],
)
def test_a_folder_of_checkpoints_belongs_to_one_run(
    make: Callable[[Path], None], message: str, tmp_path: Path, sets: TrainingSets
) -> None:
    make(tmp_path / "saves")
    with pytest.raises(ValueError, match=message):
        RunFolder(tmp_path / "run").check(configured(folder=str(tmp_path / "saves")), sets)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_used_with_a_warning(
    number: int,
    tmp_path: Path,
    sets: TrainingSets,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def flock(*arguments: object) -> None:
        raise OSError(number, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    RunFolder(tmp_path / "run").open(configured(), sets, [], 1)
    assert f"{tmp_path / 'run/.lock'} can't be locked (Function not implemented): the file system has no" in caplog.text
    with locked(tmp_path / "cache/.lock", "the cache"):
        assert f"{tmp_path / 'cache/.lock'} can't be locked" in caplog.text
    with pytest.raises(OSError, match="not implemented"):
        lock_holder(tmp_path / "run")


def test_who_holds_the_lock_is_known_and_asking_does_not_take_it(tmp_path: Path, sets: TrainingSets) -> None:
    assert lock_holder(tmp_path / "run") is None
    run = RunFolder(tmp_path / "run")
    run.open(configured(), sets, [], 1)
    holder = lock_holder(tmp_path / "run")
    assert holder is not None
    assert holder.startswith("process ")
    with pytest.raises(ValueError, match="is being trained by another process"):
        RunFolder(tmp_path / "run").open(configured(), sets, [], 1)
    run.close()
    assert lock_holder(tmp_path / "run") is None


def test_the_commit_of_an_outer_repository_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = ["git", "-c", "user.name=a", "-c", "user.email=b", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "of somebody else"], check=True)
    inner = tmp_path / "vendor/ours/pipeline/checkpoint/run_folder.py"
    inner.parent.mkdir(parents=True)
    monkeypatch.setattr(run_folder, "__file__", str(inner))
    assert code_version() == "unknown"
    inner = tmp_path / "pipeline/checkpoint/run_folder.py"
    monkeypatch.setattr(run_folder, "__file__", str(inner))
    assert len(code_version()) == 40


def test_sets_are_compared_with_those_of_the_checkpoint(tmp_path: Path) -> None:
    """A start that ends before its first save changes run.json, but not what the run was trained on."""
    names = ("a", "b", "c")
    paths = {name: str(write_numbered_set(tmp_path / name, mark, 20)) for mark, name in enumerate(names)}

    def opened(*chosen: str) -> tuple[TrainConfig, TrainingSets]:
        mixture = [MixtureEntry(shards=paths[name], weight=1) for name in chosen]
        model = ModelConfig(layers=1, width=32, heads=2, resolution=RESOLUTION)
        config = replace(configured(), model=model, data=DataConfig(mixture=mixture))
        return config, open_training_sets(config)

    def start(*chosen: str, resume_from: int | None = None) -> RunFolder:
        run, (config, sets) = RunFolder(tmp_path / "run"), opened(*chosen)
        run.check(config, sets, resume_from)
        run.open(config, sets, [], 1)
        run.close()
        return run

    def save(step: int, run: RunFolder, *chosen: str) -> None:
        _, sets = opened(*chosen)
        members = [{"digest": one.shards.digest, "name": f"my {one.name}"} for one in sets.sets]
        record = {"palette_sha256": sets.palette_sha256, "shards_digest": sets.first.digest, "step": step}
        rest = {"topology": {}, "model": {}, "files": {}, "order_fingerprint": "", "precision": ""}
        record |= rest | {"images": step, "probe_loss": 0.0, "mixture": [{"members": members, "single": False}]}
        folder = run.checkpoints / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "checkpoint.json").write_text(json.dumps(record | {"sha256": json_digest(record)}))

    save(10, start("a"), "a")
    start("a", "b")
    with pytest.raises(ValueError, match=r"step-00000010 was made with; keep at least one of them"):
        start("b")
    run = start("a")
    assert run.names_of_sets(None) == {opened("a")[1].first.digest: "my a"}
    save(20, run, "b", "c")
    with pytest.raises(ValueError, match=r"step-00000020 was made with"):
        start("a")
    start("a", resume_from=10)
    assert list(run.names_of_sets(10).values()) == ["my a"]
