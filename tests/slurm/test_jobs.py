"""The job scripts on a real SLURM: a tiny training is stopped in every way, and resumes."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_prep.common.files import read_json
from tests.launch import files_of, run
from tests.pipeline.conftest import TINY, Runner
from tests.slurm.conftest import ACCELERATORS, NODES, SCRIPTS, SIZES, Cluster, Training, job_scripts

SMALL_IMAGES = [
    "--source.kind=photographs",
    "--source.train_per_class=30",
    "--source.test_per_class=4",
    "--resolution=8",
]
SLOW_STEPS = {"schedule__steps": 700, "batch__global_size": 64}
"""Long enough for SLURM, which checks time limits every 30 s, to signal before the limit."""


def checkout(folder: Path, recipe: dict[str, Any], site: dict[str, object]) -> Path:
    """The slurm/ folder of a checkout with another configs/igpt_s.yaml and an edited slurm/site.sh.

    recipe: dotted keys of train. site: variables.
    """
    shutil.copytree(SCRIPTS, folder / "slurm")
    for package in ("data_prep", "pipeline"):
        (folder / package).symlink_to(SCRIPTS.parent / package)
    groups: dict[str, list[str]] = {}
    for key, value in recipe.items():
        group, _, name = key.rpartition(".")
        groups.setdefault(group, []).append(f"{name}: {value}")
    lines = ["\n".join(keys) if not group else f"{group}: {{{', '.join(keys)}}}" for group, keys in groups.items()]
    (folder / "configs").mkdir()
    (folder / "configs/igpt_s.yaml").write_text("\n".join(lines))
    settings = (folder / "slurm/site.sh").read_text()
    for name, value in site.items():
        assert f"\n{name}=${{{name}:-}}\n" in settings
        settings = settings.replace(f"\n{name}=${{{name}:-}}\n", f"\n{name}={value}\n")
    (folder / "slurm/site.sh").write_text(settings)
    return folder / "slurm"


def test_a_job_without_arguments_is_preempted_resumes_is_evaluated_and_published(
    cluster: Cluster, runner: Runner, shards: Path
) -> None:
    """slurm/site.sh names RUNS and SHARDS."""
    reference = Runner(shards, runner.folder / "reference")
    reference.check_trains("run", 2, **SIZES)
    published, sets = runner.folder / "published", runner.folder / "sets"
    sets.mkdir()
    (sets / "8").symlink_to(shards)
    site = {"RUNS": runner.folder, "SHARDS": sets, "EVALUATE": "density", "PUBLISH": f"dir:{published}"}
    recipe = TINY | {key.replace("__", "."): value for key, value in SIZES.items()}
    scripts = checkout(runner.folder / "checkout", recipe, site)
    training = Training(cluster, runner, reference.losses("run"), "igpt_s")
    training.job = cluster.submit(str(scripts / "pretrain_s.sh"), options=("--nodes=2",))
    training.await_step(10)
    ranks = cluster.client("scontrol", "--oneliner", "show", "step", f"{training.job}.1")
    assert "CPUs=192 " in ranks, "a rank has all CPUs of its node"
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
    measured, shown = (read_json(path / "density.json") for path in (results / "step-00000250", published / "results"))
    assert str(runner.folder) in measured.pop("command")
    assert str(runner.folder) not in shown.pop("command")
    assert shown == measured


@pytest.mark.parametrize("arguments", [(), ("--run=/tmp/run",)], ids=["no arguments", "a run"])
def test_a_job_without_a_shard_set_ends_at_once_with_one_sentence(arguments: tuple[str, ...], cluster: Cluster) -> None:
    job = cluster.submit("pretrain_s.sh", *arguments)
    assert cluster.until_ended(job) == "FAILED"
    assert cluster.job(job)["RunTime"] in ("00:00:00", "00:00:01"), "as SLURM rounds what takes less than a second"
    [sentence] = cluster.log(job).splitlines()
    assert re.match(
        r"error: set (RUNS and )?SHARDS in /.*/slurm/site.sh .* or give (--run and )?--data.shards.", sentence
    )


def test_an_invalid_option_is_reported_once_and_the_job_not_requeued(cluster: Cluster, runner: Runner) -> None:
    """The site's variables have their earlier names."""
    site = {"SITE_RUNS": str(runner.folder), "SITE_SHARDS": str(runner.shards)}
    job = cluster.submit("pretrain_s.sh", "--modle.size=s", options=("--nodes=2",), **site)
    assert cluster.until_ended(job) == "FAILED"
    assert cluster.log(job).count("modle.size is not a known key") == 1
    assert cluster.log(job).count("see python -m pipeline train --help") == 1
    assert (runner.folder / "igpt_s/logs/jobs.txt").is_file()
    assert cluster.job(job)["Restarts"] == "0"


def test_the_cluster_writes_only_to_its_folder(cluster: Cluster) -> None:
    assert list(cluster.folder.parent.glob(f"{cluster.folder.name}*")) == [cluster.folder]


def test_slurm_accepts_every_script(cluster: Cluster) -> None:
    for script in job_scripts():
        cluster.client("sbatch", "--test-only", script)


def test_a_plan_for_64_accelerators_is_printed_and_nothing_submitted(cluster: Cluster, tmp_path: Path) -> None:
    """SLURM lists 8 accelerators a node; the shard set is at 64x64, as the recipe."""
    shards = tmp_path / "sets/64"
    options = ["--source.kind=photographs", "--source.train_per_class=1", "--resolution=64", f"--out={shards}"]
    finished = run(1, "-m", "data_prep", "shards", *options, logs=tmp_path / "logs")
    assert finished.codes == [0], finished.output
    site = {"RUNS": str(tmp_path / "runs"), "SHARDS": str(shards.parent), "ACCELERATORS_PER_NODE": ""}
    jobs_before = cluster.client("squeue", "--noheader", "--format=%i").split()
    shown = cluster.run_script("pretrain_xl.sh", "--dry-run", **site)
    assert "8 nodes of 8 ranks (sbatch --nodes=N changes the nodes): SLURM lists 8 accelerators a node" in shown
    assert "SBATCH_GPUS_PER_NODE=8" in shown
    for words in ("64 ranks", "pipeline stage", "micro-batches", "bubble", "days", "GB of 80 GB"):
        assert words in shown
    assert "to start at" in shown  # SLURM's answer to the script
    assert not (tmp_path / "runs").exists()
    assert set(cluster.client("squeue", "--noheader", "--format=%i").split()) <= set(jobs_before)


def test_an_array_prepares_a_set_and_joins_it(cluster: Cluster, tmp_path: Path) -> None:
    palette, out = tmp_path / "palette.npy", tmp_path / "shards"
    for command in (
        ["palette", "--out", palette],
        ["shards", "--palette.file", palette, "--out", tmp_path / "complete"],
    ):
        finished = run(1, "-m", "data_prep", *command, *SMALL_IMAGES, logs=tmp_path / "logs")
        assert finished.codes == [0], finished.output
    options = ("--array=1-3", "--cpus-per-task=1")
    cluster.submit("prepare_shards.sh", *SMALL_IMAGES, "--palette.file", palette, "--out", out, options=options)
    cluster.until(lambda: (out / "shards.json").is_file() and not (out / "unfinished").exists(), "the join")
    assert files_of(out) == files_of(tmp_path / "complete")


@pytest.mark.slow
def test_a_signal_to_the_batch_script_saves_and_requeues(training: Training) -> None:
    training.submit()
    training.await_step(60)
    training.cluster.client("scancel", "--signal=USR1", "--batch", training.job)
    training.check_finishes(restarts=1)


@pytest.mark.slow
def test_a_cancelled_job_saves_and_is_not_requeued(training: Training) -> None:
    training.submit()
    training.await_step(60)
    training.cluster.client("scancel", training.job)
    training.cluster.until(lambda: "the job was cancelled: it is not requeued" in training.log(), "the end")
    assert training.cluster.until_ended(training.job) == "CANCELLED"
    assert training.record()["status"] == "stopped"
    assert training.restarts() == 0


@pytest.mark.slow
def test_a_stop_file_saves_and_requeues_and_status_shows_progress(training: Training) -> None:
    training.submit()
    training.await_step(60)
    shown = training.cluster.run_script("status.sh", training.run)
    assert "of 250" in shown
    assert "nats per token" in shown
    assert "hours at this throughput" in shown
    assert f"{training.job} igpt-s" in shown
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
def test_each_node_has_a_stage_of_data_and_tensor_parallel_ranks(cluster: Cluster, runner: Runner) -> None:
    """2 nodes of 4 ranks: each node has a stage, of two data-parallel ranks of two tensor-parallel ones."""
    layout = {"parallel__pipeline_stages": 2, "parallel__tensor_parallel": 2}
    reference = Runner(runner.shards, runner.folder / "reference")
    reference.check_trains("run", 8, **SIZES | layout)
    training = Training(cluster, runner, reference.losses("run"))
    training.submit("--ntasks-per-node=4", overrides=layout)
    training.await_step(60)
    assert len(training.ranks()) == 8
    cluster.client("scancel", "--signal=USR1", "--batch", training.job)
    training.check_finishes(restarts=1)
    assert "8 ranks = 2 data-parallel x 2 pipeline stages x 2 tensor-parallel" in training.log()


@pytest.mark.slow
def test_without_requeueing_the_next_job_of_an_array_resumes(training: Training) -> None:
    training.submit("--array=1-3%1")
    training.await_step(60)
    (training.run / "STOP").touch()
    cluster = training.cluster
    cluster.until(lambda: not cluster.client("squeue", "--noheader").strip(), "the end of the array")
    assert training.runner.losses("run") == training.uninterrupted
    assert (training.record()["status"], len(training.record()["starts"])) == ("finished", 2)
    copies = re.findall(r"JobState=(\w+)", cluster.client("scontrol", "--oneliner", "show", "job", training.job))
    assert sorted(copies) == ["COMPLETED", "COMPLETED", "FAILED"], "the first was stopped, the third had nothing to do"


@pytest.mark.slow
def test_a_run_resumes_on_fewer_nodes(training: Training) -> None:
    """The losses before the move are the same bit for bit, those after it up to rounding."""
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
    assert losses[:60] == training.uninterrupted[:60]
    assert losses == pytest.approx(training.uninterrupted, abs=1e-4)


@pytest.mark.slow
def test_ranks_follow_the_accelerators_that_slurm_grants(training: Training) -> None:
    """SLURM only counts them here. Without CUDA the ranks use the CPU, and the health check would fail."""
    granted = str(ACCELERATORS // 4)
    training.submit(
        "--ntasks-per-node=2", ACCELERATORS_PER_NODE=granted, SBATCH_GPUS_PER_NODE=granted, PREFLIGHT_SECONDS="0"
    )
    training.check_finishes(restarts=0)
    assert [start["ranks"] for start in training.record()["starts"]] == [4]


@pytest.mark.slow
def test_accelerators_that_no_node_can_use_are_a_user_error(training: Training) -> None:
    training.submit(ACCELERATORS_PER_NODE="2", SBATCH_GPUS_PER_NODE="2")
    assert training.cluster.until_ended(training.job) == "FAILED"
    assert training.log().count("0 of 2 accelerators can be used (on all of node1, node2).") == 1
    assert training.restarts() == 0
    assert [path.name for path in training.run.iterdir()] == ["logs"]
