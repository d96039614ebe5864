"""The scripts as committed, on a real SLURM: a tiny training is asked to stop in every way, and goes on."""

import re
from pathlib import Path

import pytest

from data_prep.common.files import read_json
from tests.launch import files_of, run
from tests.pipeline.conftest import Runner
from tests.slurm.conftest import ACCELERATORS, NODES, SIZES, Cluster, Training, job_scripts

SMALL_PICTURES = [
    "--source.kind=photographs",
    "--source.train_per_class=30",
    "--source.test_per_class=4",
    "--resolution=8",
]
SLOW_STEPS = {"schedule__steps": 700, "batch__global_size": 64}
"""So long that SLURM, which looks at time limits every 30 s, sees the limit come."""


def test_an_urgent_job_preempts_the_run_resumes_is_evaluated_and_published(
    cluster: Cluster, runner: Runner, shards: Path
) -> None:
    reference = Runner(shards, runner.folder / "reference")
    reference.check_trains("run", 2, **SIZES)
    training, published = Training(cluster, runner, reference.losses("run")), runner.folder / "published"
    training.submit("--ntasks-per-node=1", EVALUATE="density", PUBLISH=f"dir:{published}")
    training.await_step(10)
    urgent = cluster.client(
        "sbatch", "--parsable", "--partition=urgent", f"--nodes={NODES}", "--exclusive", "--output=/dev/null",
        "--wrap=true",
    ).strip()  # fmt: skip
    assert cluster.until_ended(urgent) == "COMPLETED"
    training.check_finishes(restarts=1)
    assert "stopped on request at step" in training.log()
    results = training.run / "results"
    cluster.until(lambda: len(list(results.glob("step-*/density.json"))) == 2, "the evaluation of two checkpoints")
    assert sorted(path.name for path in results.iterdir()) == ["step-00000240", "step-00000250"]
    cluster.until((published / "config.json").is_file, "the publishing")
    assert read_json(published / "results/density.json") == read_json(results / "step-00000250/density.json")


def test_a_mistake_is_said_and_not_requeued(cluster: Cluster, runner: Runner) -> None:
    job = cluster.submit("pretrain_s.sh", "--run", runner.folder / "run", "--modle.size=s", options=("--nodes=2",))
    assert cluster.until_ended(job) == "FAILED"
    assert cluster.log(job).count("modle.size is not a known key") == 1
    assert cluster.job(job)["Restarts"] == "0"


def test_all_that_the_cluster_writes_is_in_its_folder(cluster: Cluster) -> None:
    assert list(cluster.folder.parent.glob(f"{cluster.folder.name}*")) == [cluster.folder]


def test_slurm_takes_every_script(cluster: Cluster) -> None:
    for script in job_scripts():
        cluster.client("sbatch", "--test-only", script)


def test_a_plan_for_64_accelerators_is_printed_and_nothing_submitted(cluster: Cluster, tmp_path: Path) -> None:
    site = Path(__file__).parent / "site_64.sh"
    jobs_before = cluster.client("squeue", "--noheader", "--format=%i").split()
    said = cluster.run_script("pretrain_xl.sh", "--dry-run", "--run", tmp_path / "run", SITE_FILE=str(site))
    for words in ("8 nodes of 8 ranks", "64 ranks", "pipeline stage", "micro-batches", "bubble", "days", "GB of 80 GB"):
        assert words in said
    assert "to start at" in said  # SLURM's word on the script
    assert not (tmp_path / "run").exists()
    assert set(cluster.client("squeue", "--noheader", "--format=%i").split()) <= set(jobs_before)


def test_an_array_prepares_a_set_and_joins_it(cluster: Cluster, tmp_path: Path) -> None:
    palette, out = tmp_path / "palette.npy", tmp_path / "shards"
    for command in (["palette", "--out", palette], ["shards", "--palette.file", palette, "--out", tmp_path / "whole"]):
        finished = run(1, "-m", "data_prep", *command, *SMALL_PICTURES, logs=tmp_path / "logs")
        assert finished.codes == [0], finished.output
    options = ("--array=1-3", "--cpus-per-task=1")
    cluster.submit("prepare_shards.sh", *SMALL_PICTURES, "--palette.file", palette, "--out", out, options=options)
    cluster.until(lambda: (out / "shards.json").is_file() and not (out / "unfinished").exists(), "the join")
    assert files_of(out) == files_of(tmp_path / "whole")


@pytest.mark.slow
def test_a_signal_to_the_batch_script_saves_and_requeues(training: Training) -> None:
    training.submit()
    training.await_step(60)
    training.cluster.client("scancel", "--signal=USR1", "--batch", training.job)
    training.check_finishes(restarts=1)


@pytest.mark.slow
def test_a_cancelled_job_saves_and_is_not_queued_again(training: Training) -> None:
    training.submit()
    training.await_step(60)
    training.cluster.client("scancel", training.job)
    training.cluster.until(lambda: "the job was cancelled: it is not requeued" in training.log(), "the end")
    assert training.cluster.until_ended(training.job) == "CANCELLED"
    assert training.record()["status"] == "stopped"
    assert training.restarts() == 0


@pytest.mark.slow
def test_a_stop_file_saves_and_requeues_and_status_says_so(training: Training) -> None:
    training.submit()
    training.await_step(60)
    said = training.cluster.run_script("status.sh", training.run)
    assert "of 250" in said
    assert "nats per token" in said
    assert "hours at this rate" in said
    assert f"{training.job} igpt-s" in said
    (training.run / "STOP").touch()
    training.check_finishes(restarts=1)


@pytest.mark.slow
def test_before_the_time_limit_the_run_is_saved_and_requeued(cluster: Cluster, shards: Path, runner: Runner) -> None:
    reference = Runner(shards, runner.folder / "reference")
    sizes = {"model__size": "null", "batch__micro_size": 2, **SLOW_STEPS}
    reference.check_trains("run", 4, **sizes)
    training = Training(cluster, runner, reference.losses("run"))
    training.submit("--time=2", "--signal=B:USR1@60", overrides=SLOW_STEPS)
    training.check_finishes()
    assert training.restarts() >= 1
    assert "asked to stop: the ranks save" in training.log()
    assert not (training.run / "failures.jsonl").exists()


@pytest.mark.slow
def test_without_requeueing_the_next_copy_of_an_array_goes_on(training: Training) -> None:
    training.submit("--array=1-3%1")
    training.await_step(60)
    (training.run / "STOP").touch()
    cluster = training.cluster
    cluster.until(lambda: not cluster.client("squeue", "--noheader").strip(), "the end of the array")
    assert training.runner.losses("run") == training.unbroken
    assert (training.record()["status"], len(training.record()["starts"])) == ("finished", 2)
    copies = re.findall(r"JobState=(\w+)", cluster.client("scontrol", "--oneliner", "show", "job", training.job))
    assert sorted(copies) == ["COMPLETED", "COMPLETED", "FAILED"], "the first stopped, the third had nothing to do"


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_nodes(training: Training) -> None:
    """Contract 7: what was trained before the move is the same bit for bit, what comes after up to rounding."""
    cluster = training.cluster
    training.submit("--nodes=1-2")
    training.await_step(60)
    [first, *others] = [f"node{number}" for number in range(1, NODES + 1)]
    assert cluster.job(training.job)["NodeList"] == "node[1-2]"
    cluster.client("scontrol", "update", f"NodeName={','.join(others)}", "State=DRAIN", "Reason=test")
    try:
        cluster.client("scancel", "--signal=USR1", "--batch", training.job)
        assert cluster.until_ended(training.job) == "COMPLETED", training.log()
    finally:
        cluster.client("scontrol", "update", f"NodeName={','.join(others)}", "State=RESUME")
    assert cluster.job(training.job)["NodeList"] == first
    record, losses = training.record(), training.runner.losses("run")
    assert [start["ranks"] for start in record["starts"]] == [4, 2]
    assert losses[:60] == training.unbroken[:60]
    assert losses == pytest.approx(training.unbroken, abs=1e-4)


@pytest.mark.slow
def test_ranks_follow_the_accelerators_that_slurm_grants(training: Training) -> None:
    """They are counted and scheduled only: without CUDA the ranks take the CPU, and a look at the nodes would fail."""
    granted = str(ACCELERATORS // 4)
    training.submit(
        "--ntasks-per-node=2", ACCELERATORS_PER_NODE=granted, SBATCH_GPUS_PER_NODE=granted, PREFLIGHT_SECONDS="0"
    )
    training.check_finishes(restarts=0)
    assert [start["ranks"] for start in training.record()["starts"]] == [4]


@pytest.mark.slow
def test_accelerators_that_cannot_be_used_anywhere_are_a_mistake(training: Training) -> None:
    training.submit(ACCELERATORS_PER_NODE="2", SBATCH_GPUS_PER_NODE="2")
    assert training.cluster.until_ended(training.job) == "FAILED"
    assert training.log().count("0 of 2 accelerators can be used (on all of node1, node2).") == 1
    assert training.restarts() == 0
    assert [path.name for path in training.run.iterdir()] == ["logs"]
