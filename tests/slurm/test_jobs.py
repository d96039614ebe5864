"""The scripts as committed, on a SLURM of four nodes: a tiny training stopped in every way, and gone on with."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.launch import files_of, run
from tests.pipeline.conftest import Runner
from tests.slurm.conftest import Cluster, job_scripts

STEPS = 250
SIZES = {
    "model__size": "null",
    "schedule__steps": STEPS,
    "batch__micro_size": 2,
    "checkpoint__every_steps": 40,
    "checkpoint__keep_last": 2,
}
SMALL_PICTURES = [
    "--source.kind=photographs",
    "--source.train_per_class=30",
    "--source.test_per_class=4",
    "--resolution=8",
]
TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2")


@pytest.fixture(scope="module")
def unbroken(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the same run on four ranks, without a scheduler."""
    runner = Runner(shards, tmp_path_factory.mktemp("unbroken"))
    runner.check_trains("run", 4, **SIZES)
    return runner.losses("run")


def submit(cluster: Cluster, runner: Runner, **variables: str) -> str:
    return cluster.submit("pretrain_s.sh", *runner.arguments("run", **SIZES)[3:], options=TWO_BY_TWO, **variables)


def await_step(cluster: Cluster, runner: Runner, step: int) -> None:
    rows = runner.folder / "run/metrics.jsonl"
    cluster.until(lambda: rows.is_file() and len(rows.read_text().splitlines()) > step, f"step {step}")


def check_finished(cluster: Cluster, runner: Runner, job: str, unbroken: list[float], restarts: int) -> None:
    assert cluster.until_ended(job, 180) == "COMPLETED", cluster.log(job)
    assert runner.losses("run") == unbroken
    record = json.loads((runner.folder / "run/run.json").read_text())
    assert record["status"] == "finished"
    assert len(record["starts"]) == restarts + 1
    assert cluster.job(job)["Restarts"] == str(restarts)


def test_an_urgent_job_preempts_the_run_goes_on_and_is_evaluated(
    cluster: Cluster, runner: Runner, unbroken: list[float]
) -> None:
    job = submit(cluster, runner, EVALUATE="density")
    await_step(cluster, runner, 60)
    urgent = cluster.client(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 3"
    ).strip()
    assert cluster.until_ended(urgent) == "COMPLETED"
    check_finished(cluster, runner, job, unbroken, restarts=1)
    assert "stopped on request at step" in cluster.log(job)
    results = runner.folder / "run/results"
    cluster.until(lambda: len(list(results.glob("step-*/density.json"))) == 2, "the evaluation of two checkpoints")
    assert sorted(path.name for path in results.iterdir()) == ["step-00000240", "step-00000250"]


@pytest.mark.slow
def test_a_signal_to_the_batch_script_saves_and_requeues(
    cluster: Cluster, runner: Runner, unbroken: list[float]
) -> None:
    job = submit(cluster, runner)
    await_step(cluster, runner, 60)
    cluster.client("scancel", "--signal=USR1", "--batch", job)
    check_finished(cluster, runner, job, unbroken, restarts=1)


@pytest.mark.slow
def test_a_stop_file_saves_and_requeues(cluster: Cluster, runner: Runner, unbroken: list[float]) -> None:
    job = submit(cluster, runner)
    await_step(cluster, runner, 60)
    (runner.folder / "run/STOP").touch()
    check_finished(cluster, runner, job, unbroken, restarts=1)


@pytest.mark.slow
def test_a_lost_node_is_an_accident_that_the_run_survives(
    cluster: Cluster, runner: Runner, unbroken: list[float]
) -> None:
    job = submit(cluster, runner)
    await_step(cluster, runner, 60)
    cluster.node("off", 2)
    check_finished(cluster, runner, job, unbroken, restarts=1)
    cluster.node("on", 2)


@pytest.mark.slow
def test_a_killed_rank_is_an_accident_that_the_run_survives(
    cluster: Cluster, runner: Runner, unbroken: list[float]
) -> None:
    job = submit(cluster, runner)
    await_step(cluster, runner, 60)
    pattern = f"pipeline train --config .* --run={runner.folder}/run"
    ranks = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=True).stdout.split()
    python = [rank for rank in ranks if "python" in Path(f"/proc/{rank}/exe").resolve().name]
    os.kill(int(python[-1]), signal.SIGKILL)
    check_finished(cluster, runner, job, unbroken, restarts=1)
    assert ": requeue" in cluster.log(job)


@pytest.mark.slow
def test_without_requeueing_the_next_copy_of_an_array_goes_on(
    cluster: Cluster, runner: Runner, unbroken: list[float]
) -> None:
    arguments = runner.arguments("run", **SIZES)[3:]
    cluster.submit("pretrain_s.sh", *arguments, options=(*TWO_BY_TWO, "--array=1-3%1"))
    await_step(cluster, runner, 60)
    (runner.folder / "run/STOP").touch()
    cluster.until(lambda: not cluster.client("squeue", "--noheader").strip(), "the end of the array", 180)
    assert runner.losses("run") == unbroken
    record = json.loads((runner.folder / "run/run.json").read_text())
    assert (record["status"], len(record["starts"])) == ("finished", 2)


def test_a_mistake_is_said_and_not_requeued(cluster: Cluster, runner: Runner) -> None:
    job = cluster.submit("pretrain_s.sh", "--run", runner.folder / "run", "--modle.size=s", options=TWO_BY_TWO)
    assert cluster.until_ended(job) == "FAILED"
    assert "modle.size is no known key" in cluster.log(job)
    assert cluster.job(job)["Restarts"] == "0"


def test_slurm_takes_every_script(cluster: Cluster) -> None:
    for script in job_scripts():
        cluster.client("sbatch", "--test-only", "--nodes=2", script)


def test_an_array_prepares_a_set_and_joins_it(cluster: Cluster, tmp_path: Path) -> None:
    palette, out = tmp_path / "palette.npy", tmp_path / "shards"
    for command in (["palette", "--out", palette], ["shards", "--palette.file", palette, "--out", tmp_path / "whole"]):
        finished = run(1, "-m", "data_prep", *command, *SMALL_PICTURES, logs=tmp_path / "logs")
        assert finished.codes == [0], finished.output
    options = ("--array=1-3", "--cpus-per-task=1")
    cluster.submit("prepare_shards.sh", *SMALL_PICTURES, "--palette.file", palette, "--out", out, options=options)
    cluster.until(lambda: (out / "shards.json").is_file() and not (out / "unfinished").exists(), "the join")
    assert files_of(out) == files_of(tmp_path / "whole")
