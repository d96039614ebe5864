"""What is found before a job runs: its run and shard set, the accelerators of its nodes, errors in a dry run."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import JOB, SCRIPTS, run_script


@pytest.mark.parametrize(
    ("site", "missing"),
    [
        ({}, "set RUNS and SHARDS in {site} to where your runs and shard sets are, or give --run and --data.shards."),
        ({"RUNS": "/runs"}, "set SHARDS in {site} to where your shard sets are, or give --data.shards."),
        ({"SITE_SHARDS": "/sets"}, "set RUNS in {site} to where your runs are, or give --run."),
    ],
    ids=["nothing", "no shard sets", "no runs"],
)
@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]], ids=["job", "dry run"])
def test_without_runs_and_shards_a_script_ends_at_once(
    dry_run: list[str], site: dict[str, str], missing: str, stubs: Path
) -> None:
    before = os.times()
    finished = run_script("pretrain_xl.sh", *dry_run, **JOB, **site)
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 0.5
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == f"error: {missing.format(site=SCRIPTS / 'site.sh')}\n"
    assert not stubs.exists() or "python" not in stubs.read_text()


@pytest.mark.parametrize("names", [("RUNS", "SHARDS"), ("SITE_RUNS", "SITE_SHARDS")])
@pytest.mark.parametrize("where", ["environment", "short file", "edited file"])
def test_runs_and_shards_have_earlier_names(names: tuple[str, str], where: str, stubs: Path, tmp_path: Path) -> None:
    """A site's file may set just these, or source slurm/site.sh. SHARDS may be a shard set itself."""
    values = dict(zip(names, (f"{tmp_path}/runs", f"{tmp_path}/set"), strict=True))
    (tmp_path / "set").mkdir()
    (tmp_path / "set/shards.json").touch()
    variables = dict(values)
    if where != "environment":
        lines = [f"{name}={value}\n" for name, value in values.items()]
        lines += ['source "$SCRIPTS/site.sh"\n'] if where == "edited file" else []
        (tmp_path / "site.sh").write_text("".join(lines))
        variables = {"SITE_FILE": str(tmp_path / "site.sh")}
    finished = run_script("pretrain_s.sh", **JOB, **variables)
    assert finished.returncode == 0, finished.stderr
    assert f" --run {tmp_path}/runs/igpt_s --data.shards {tmp_path}/set\n" in stubs.read_text()


def bash(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", script], env={**os.environ, **variables}, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("partitions", "of_default", "of_train"),
    [
        ("train* gpu:8", "8", "8"),
        ("train* gpu:h100:8(S:0-1)", "8", "8"),
        ("train* gpu:a100:4(S:0),gpu:h100:4(S:0,1),nvme:2", "8", "8"),
        ("train* gpu", "1", "1"),
        ("train* (null)", "0", "0"),
        ("train* gpu:4\ntrain* gpu:h100:8\ntrain* (null)", "0 4 8", "0 4 8"),
        ("cpu* (null)\ntrain gpu:8", "0", "8"),
        ("", "", ""),
    ],
)
def test_accelerators_are_read_from_the_partitions_gres(
    partitions: str, of_default: str, of_train: str, tmp_path: Path
) -> None:
    """As sinfo prints it; with --partition it prints only these partitions."""
    for name, listed in (("default", partitions), ("train", partitions.partition("cpu* (null)\n")[2] or partitions)):
        (tmp_path / name).write_text(listed + "\n")
    sinfo = tmp_path / "sinfo"
    sinfo.write_text(
        f'#!/bin/sh\ncase "$*" in *--partition=train*) cat {tmp_path}/train;; *) cat {tmp_path}/default;; esac\n'
    )
    sinfo.chmod(0o755)
    source = f"PATH={tmp_path}:$PATH; source {SCRIPTS}/lib/accelerators.sh"
    found = bash(f"{source}; gpus_of_partition ''; gpus_of_partition train").stdout
    assert found == f"{of_default}\n{of_train}\n"


@pytest.mark.parametrize(
    ("variables", "gres", "requested"),
    [
        ({}, "train* gpu:8", "8"),
        ({"ACCELERATORS_PER_NODE": "4"}, "train* gpu:8", "4"),
        ({"ACCELERATORS_PER_NODE": "0"}, "train* gpu:8", ""),
        ({}, "train* (null)", ""),
        ({}, "train* gpu:4\ntrain* gpu:8", ""),
    ],
    ids=["detected", "explicit", "CPUs", "none listed", "nodes differ"],
)
def test_sourcing_the_sites_file_has_sbatch_ask_for_accelerators(
    variables: dict[str, str], gres: str, requested: str, tmp_path: Path
) -> None:
    (tmp_path / "sinfo").write_text(f"#!/bin/sh\ncat <<E\n{gres}\nE\n")
    (tmp_path / "sinfo").chmod(0o755)
    shown = bash(f'PATH={tmp_path}:$PATH; source {SCRIPTS}/site.sh; echo "$SBATCH_GPUS_PER_NODE"', **variables)
    assert shown.stdout.strip() == requested
    assert ("nodes have 4 or 8 accelerators" in shown.stderr) == ("gpu:4" in gres)


def test_a_job_on_nodes_with_accelerators_that_was_given_none_ends_with_one_sentence(stubs: Path) -> None:
    (stubs.parent / "stubs/sinfo").write_text("#!/bin/sh\necho 'train gpu:8'\n")
    options = ["--run", "/none", "--data.shards", "/none"]
    finished = run_script("pretrain_s.sh", *options, **JOB, SLURM_JOB_PARTITION="train")
    assert finished.returncode == 2
    assert "the nodes of the job have 8 accelerators, and it was given none: `source" in finished.stderr
    assert not stubs.exists()


@pytest.mark.parametrize(
    ("variables", "found", "hidden"),
    [
        ({"SLURM_GPUS_ON_NODE": "8"}, "8", False),
        ({"SLURM_GPUS_ON_NODE": "8", "ACCELERATORS_PER_NODE": "4"}, "4", False),
        ({"SLURM_GPUS_ON_NODE": "8", "ACCELERATORS_PER_NODE": "0"}, "0", True),
        ({"SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_PARTITION": "train"}, "0", False),
    ],
    ids=["granted", "explicit", "CPUs", "tasks"],
)
def test_a_job_uses_the_accelerators_that_slurm_granted(
    variables: dict[str, str], found: str, hidden: bool, stubs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (stubs.parent / "stubs/sinfo").write_text("#!/bin/sh\necho 'train gpu:8'\n")
    source = f"SCRIPTS={SCRIPTS}; source $SCRIPTS/common.sh; find_granted_accelerators"
    shown = bash(f"{source}; echo $ACCELERATORS_PER_NODE ${{CUDA_VISIBLE_DEVICES-visible}}", **variables)
    assert shown.stdout == f"{found}{'' if hidden else ' visible'}\n", shown.stderr


def test_a_slurm_that_does_not_answer_leaves_the_accelerators_unknown(sbatch: Path, tmp_path: Path) -> None:
    (sbatch.parent / "bin/sinfo").write_text("#!/bin/sh\nexit 1\n")
    (sbatch.parent / "bin/sinfo").chmod(0o755)
    finished = run_script("pretrain_s.sh", "--dry-run", RUNS=str(tmp_path), SHARDS="/sets")
    assert finished.returncode == 2
    assert "SLURM does not answer, so the accelerators of its nodes are unknown; set ACC" in finished.stderr


@pytest.mark.parametrize(
    ("answers", "sentence"), [("0", "SLURM does not accept the script"), ("1", "SLURM does not answer here")]
)
def test_a_refused_script_and_a_silent_slurm_differ(answers: str, sentence: str, tmp_path: Path) -> None:
    for name, code in (("sbatch", "1"), ("scontrol", answers)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / name).chmod(0o755)
    shown = bash(f"SCRIPTS={SCRIPTS}; source $SCRIPTS/common.sh; PATH={tmp_path}:$PATH; show_submission a_script")
    assert shown.returncode == 2
    assert sentence in shown.stderr


EARLIER_SITE = """
ACCELERATORS_PER_NODE=${ACCELERATORS_PER_NODE:-0}
SITE_RUNS=/runs SITE_SHARDS=/sets SITE_PYTHON=${SITE_PYTHON:-} SITE_REQUEUES=true MAX_RESTARTS=1 MAX_FAILURES=''
PREFLIGHT_SECONDS=0 MAX_EXCLUDED=4 EVALUATE='' PUBLISH='' ACCELERATOR=h100-80gb
SITE_EVALUATE=() SITE_CPU=() SITE_LAUNCH=()
site_prepare() { :; }
"""
"""What a complete site.sh set before it knew RUNS and SHARDS."""


def test_in_an_earlier_site_file_no_number_of_accelerators_stands_for_those_granted(
    stubs: Path, tmp_path: Path
) -> None:
    (tmp_path / "site.sh").write_text(EARLIER_SITE.replace("/runs", str(tmp_path / "runs")))
    finished = run_script("pretrain_s.sh", **JOB, SITE_FILE=str(tmp_path / "site.sh"), SLURM_GPUS_ON_NODE="8")
    assert finished.returncode == 0, finished.stderr
    assert "--ntasks=16 --ntasks-per-node=8" in stubs.read_text()
    assert f"--run {tmp_path}/runs/igpt_s --data.shards /sets/32" in stubs.read_text()


@pytest.mark.parametrize("own", ["--data.shards /mine", "--data {shards:\\ /mine}", "--data={shards: /mine}"])
def test_shards_named_in_any_form_are_the_users(own: str, stubs: Path, tmp_path: Path) -> None:
    finished = run_script("pretrain_s.sh", *shlex.split(own), **JOB, RUNS=str(tmp_path), SHARDS="/sets")
    assert finished.returncode == 0, finished.stderr
    assert "/sets" not in stubs.read_text()


def test_the_users_own_request_of_accelerators_is_kept(tmp_path: Path) -> None:
    (tmp_path / "sinfo").write_text("#!/bin/sh\necho 'train* gpu:8'\n")
    (tmp_path / "sinfo").chmod(0o755)
    source = f"PATH={tmp_path}:$PATH; source {SCRIPTS}/site.sh"
    kept = bash(f"{source}; echo $SBATCH_GPUS_PER_NODE", SBATCH_GPUS_PER_NODE="h100:4")
    assert kept.stdout == "h100:4\n"
    again = bash(f"{source}; ACCELERATORS_PER_NODE=0; {source}; echo ${{SBATCH_GPUS_PER_NODE-none}}")
    assert again.stdout == "none\n", "what it set itself is withdrawn"


@pytest.mark.parametrize(
    ("variables", "options", "message"),
    [
        ({"SHARDS": ""}, [], "error: set SHARDS in "),
        ({"SITE_FILE": "/none.sh"}, [], "error: SITE_FILE is /none.sh, which does not exist"),
        ({"ACCELERATORS_PER_NODE": "all"}, [], "error: ACCELERATORS_PER_NODE is all; it must be a number"),
        (
            {"ACCELERATORS_PER_NODE": ""},
            [],
            "error: the nodes of the default partition have 4 or 8 accelerators; set ACC",
        ),
        (
            {"SITE_PYTHON": "/none/python"},
            [],
            "error: /none/python is not a program; run `make set-up`, or set SITE_PYTHON",
        ),
        ({"SITE_PYTHON": "BARE"}, [], "lacks the packages deepspeed, jsonargparse, numpy, safetensors, torch, transf"),
        (
            {},
            ["--modle.size=s"],
            "error: modle.size is not a known key; did you mean model.size? (see python -m pipeline train",
        ),
        ({"SHARDS": "/none"}, [], "error: /none/8 does not exist"),
        pytest.param(
            {},
            ["--model.resolution=16"],
            "error: model.resolution is 16; it must be 8, the resolution of the shard set",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"ACCELERATORS_PER_NODE": "3"},
            [],
            "error: batch.global_size is 128; it must be a multiple of batch.micro_size",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["argument", "site", "accelerators", "partition", "python", "packages", "key", "set", "resolution", "batch"],
)
def test_a_dry_run_reports_each_error_in_one_sentence(
    variables: dict[str, str], options: list[str], message: str, sbatch: Path, shards: Path, tmp_path: Path
) -> None:
    bare, sinfo = tmp_path / "python", sbatch.parent / "bin/sinfo"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')  # without installed packages
    sinfo.write_text("#!/bin/sh\necho 'train* gpu:4'; echo 'train* gpu:8'\n")
    for program in (bare, sinfo):
        program.chmod(0o755)
    site = {"RUNS": str(tmp_path / "runs"), "SHARDS": str(shards), "ACCELERATORS_PER_NODE": "0", **variables}
    site = {key: str(bare) if value == "BARE" else value for key, value in site.items()}
    finished = run_script("pretrain_s.sh", "--dry-run", "--model.resolution=8", *options, **site)
    assert finished.returncode == 2
    [sentence] = finished.stderr.splitlines()
    assert message in sentence
    assert not sbatch.exists(), "SLURM is asked last"
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_without_errors_prints_the_plan_and_asks_slurm(sbatch: Path, shards: Path, tmp_path: Path) -> None:
    site = {"RUNS": str(tmp_path / "runs"), "SHARDS": str(shards), "ACCELERATORS_PER_NODE": "2"}
    finished = run_script("pretrain_s.sh", "--test", "--model.resolution=8", **site)
    assert finished.returncode == 0, finished.stderr
    assert f"run {tmp_path}/runs/igpt_s, shard set {shards}\n" in finished.stdout
    assert "1 nodes of 2 ranks (sbatch --nodes=N changes the nodes): ACCELERATORS_PER_NODE is 2" in finished.stdout
    assert "micro-batches" in finished.stdout
    assert sbatch.read_text() == f"--test-only {SCRIPTS}/pretrain_s.sh --model.resolution=8\n"
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_takes_sbatchs_number_of_nodes(sbatch: Path, shards: Path, tmp_path: Path) -> None:
    site = {"RUNS": str(tmp_path / "runs"), "SHARDS": str(shards), "ACCELERATORS_PER_NODE": "2"}
    finished = run_script("pretrain_s.sh", "--dry-run", "--nodes=4", "--model.resolution=8", **site)
    assert finished.returncode == 0, finished.stderr
    assert "4 nodes of 2 ranks" in finished.stdout
    assert sbatch.read_text() == f"--test-only --nodes=4 {SCRIPTS}/pretrain_s.sh --model.resolution=8\n"
    finished = run_script("pretrain_s.sh", "--dry-run", "--nodes=many", "--model.resolution=8", **site)
    assert (finished.returncode, finished.stderr) == (2, "error: --nodes is many; it must be a number of nodes.\n")


def test_a_job_refuses_sbatchs_number_of_nodes(stubs: Path) -> None:
    finished = run_script("pretrain_s.sh", "--nodes", "4", **JOB)
    message = "error: --nodes is an option of sbatch: give it before the script, sbatch --nodes=N pretrain_s.sh.\n"
    assert (finished.returncode, finished.stderr) == (2, message)
