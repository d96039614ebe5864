"""The job scripts without a SLURM: stubs record what they start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import SCRIPTS, job_scripts

JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "PREFLIGHT_SECONDS": "0"}


def run_script(script: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("RUNS", "SHARDS")} | variables
    return subprocess.run([SCRIPTS / script, *map(str, arguments)], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("script", job_scripts(), ids=lambda path: path.stem)
def test_options_of_sbatch_are_before_the_first_command(script: Path) -> None:
    """sbatch silently ignores later ones."""
    lines = script.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not [line for line in lines[first:] if line.startswith("#SBATCH")]


@pytest.mark.parametrize("script", job_scripts(), ids=lambda path: path.stem)
def test_without_slurm_a_script_shows_how_to_submit_it(script: Path) -> None:
    finished = subprocess.run(["bash", script, "--run", "/none"], capture_output=True, text=True)
    assert finished.returncode == 2
    assert "submit it with sbatch" in finished.stderr


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The submissions, a line each: an sbatch that only records its arguments is first in PATH."""
    submitted, stub = tmp_path / "submitted.txt", tmp_path / "bin/sbatch"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/sh\necho "$@" >>{submitted}\necho 7\n')
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stub.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SITE_PYTHON", sys.executable)
    return submitted


def test_follow_up_jobs_are_submitted_once_for_each_destination(sbatch: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for folder in ("logs", "checkpoints/step-00000040"):
        (run / folder).mkdir(parents=True)

    def follow(published: str) -> str:
        bash = f"SCRIPTS={SCRIPTS}; source $SCRIPTS/common.sh; source $SCRIPTS/lib/followup.sh; follow_up {run} 2>&1"
        variables = {**os.environ, "PUBLISH": published}
        return subprocess.run(["bash", "-c", bash], env=variables, capture_output=True, text=True, check=True).stdout

    follow("")
    for published in ("dir:one", "dir:one", "dir:two"):
        assert published in follow(published), "a job that is not submitted again is named"
    assert [line.split()[-1] for line in sbatch.read_text().splitlines()] == ["dir:one", "dir:two"]


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The started programs, a line each: SLURM's clients and a Python that only record their arguments."""
    started, folder = tmp_path / "started.txt", tmp_path / "stubs"
    folder.mkdir()
    for name in ("srun", "scontrol", "sinfo", "python", "sbatch", "container"):
        stub = folder / name
        stub.write_text(f'#!/bin/sh\necho {name} "$@" >>{started}\ncase "$*" in *--after*) echo done;; esac\n')
        stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SITE_PYTHON", str(folder / "python"))
    return started


@pytest.mark.parametrize(
    ("granted", "nodes_and_ranks"),
    [
        ({"SLURM_NTASKS_PER_NODE": "2"}, "--nodes=2 --ntasks=4 --ntasks-per-node=2"),
        ({"SLURM_GPUS_ON_NODE": "8", "ACCELERATORS_PER_NODE": "8"}, "--nodes=2 --ntasks=16 --ntasks-per-node=8"),
        ({"SLURM_GPUS_ON_NODE": "8", "ACCELERATORS_PER_NODE": "0"}, "--nodes=2 --ntasks=2 --ntasks-per-node=1"),
        ({"SLURM_NTASKS": "3"}, "--nodes=2 --ntasks=4 --ntasks-per-node=2"),
        ({}, "--nodes=2 --ntasks=2 --ntasks-per-node=1"),
    ],
    ids=["tasks per node", "accelerators", "CPUs", "tasks", "nodes alone"],
)
def test_a_job_starts_a_process_a_rank_on_neighbors(
    granted: dict[str, str], nodes_and_ranks: str, stubs: Path, tmp_path: Path
) -> None:
    site = {"RUNS": str(tmp_path / "runs"), "SHARDS": "/shards"}
    script = [SCRIPTS / "pretrain_xl.sh", "--model.layers", "2"]
    subprocess.run(script, env={**os.environ, **JOB, **site, **granted}, check=True)
    [ranks] = [line for line in stubs.read_text().splitlines() if line.startswith("srun")]
    assert f"{nodes_and_ranks} --distribution=block:block" in ranks
    train = (
        f"train --config {SCRIPTS.parent}/configs/igpt_xl.yaml --run {tmp_path}/runs/igpt_xl --data.shards /shards/64"
    )
    assert ranks.endswith(f"-m pipeline {train} --model.layers 2"), "the site's paths, unless others are given"


ARRAY = {
    "SLURM_ARRAY_JOB_ID": "7",
    "SLURM_ARRAY_TASK_ID": "0",
    "SLURM_ARRAY_TASK_MIN": "0",
    "SLURM_ARRAY_TASK_COUNT": "1",
}


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
        ("train* (null)", "", ""),
        ("train* gpu:4\ntrain* gpu:h100:8\ntrain* (null)", "4 8", "4 8"),
        ("cpu* (null)\ntrain gpu:8", "", "8"),
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
    assert "the nodes of the job have 8 accelerators, and the job was given none: `source" in finished.stderr
    assert not stubs.exists()


@pytest.mark.parametrize(
    ("variables", "devices", "found"),
    [
        ({"SLURM_GPUS_ON_NODE": "8"}, "true", "8"),
        ({"SLURM_GPUS_ON_NODE": "8", "ACCELERATORS_PER_NODE": "4"}, "true", "4"),
        ({"SLURM_GPUS_ON_NODE": "8", "ACCELERATORS_PER_NODE": "0"}, "true", "0"),
        ({"SLURM_GPUS_ON_NODE": "8"}, "false", "0"),
        ({"SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_PARTITION": "train"}, "true", "0"),
    ],
    ids=["granted", "explicit", "CPUs", "no device files", "tasks"],
)
def test_a_job_uses_the_accelerators_that_slurm_granted(
    variables: dict[str, str], devices: str, found: str, stubs: Path
) -> None:
    (stubs.parent / "stubs/sinfo").write_text("#!/bin/sh\necho 'train gpu:8'\n")
    source = f"SCRIPTS={SCRIPTS}; source $SCRIPTS/common.sh; has_gpu_devices() {{ {devices}; }}"
    shown = bash(f"{source}; find_granted_accelerators; echo $ACCELERATORS_PER_NODE", **variables)
    assert shown.stdout.splitlines()[-1] == found, shown.stderr
    assert ("the ranks run on CPUs" in shown.stdout) == (devices == "false")


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
        ({}, ["--model.resolution=16"], "error: model.resolution is 16; it must be 8, the resolution of the shard set"),
        (
            {"ACCELERATORS_PER_NODE": "3"},
            [],
            "error: batch.global_size is 128; it must be a multiple of batch.micro_size",
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
    assert "1 nodes of 2 ranks (sbatch --nodes=N changes the nodes): ACCELERATORS_PER_NODE is 2" in finished.stdout
    assert "micro-batches" in finished.stdout
    assert sbatch.read_text() == f"--test-only {SCRIPTS}/pretrain_s.sh --model.resolution=8\n"
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A run with a checkpoint."""
    (tmp_path / "run/checkpoints/step-00000040").mkdir(parents=True)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("script", "arguments", "started"),
    [
        ("pretrain_s.sh", "--run RUN --data.shards SHARDS", ["srun", "-m pipeline train", "-m pipeline status"]),
        ("evaluate.sh", "--run RUN --shards SHARDS --out OUT", ["-m pipeline evaluate"]),
        ("publish.sh", "--run RUN --to dir:OUT", ["-m pipeline publish"]),
        ("prepare_shards.sh", "--out OUT", ["sbatch", "-m data_prep join", "-m data_prep shards"]),
    ],
)
def test_site_prepare_can_change_how_python_is_started(
    script: str, arguments: str, started: list[str], stubs: Path, trained: Path, tmp_path: Path
) -> None:
    (tmp_path / "site.sh").write_text(
        'source "$SCRIPTS/site.sh"\nsite_prepare() { SITE_LAUNCH=(container exec) PYTHON=/in/it/python; }\n'
    )
    command = [SCRIPTS / script, *arguments.replace("RUN", str(trained)).split()]
    subprocess.run(command, env={**os.environ, **JOB, **ARRAY, "SITE_FILE": str(tmp_path / "site.sh")}, check=True)
    lines = stubs.read_text()
    pythons = [line for line in lines.splitlines() if "-m " in line]
    assert all("container exec /in/it/python -m " in line for line in pythons), lines
    assert all(word in "\n".join(pythons) for word in started), lines


def test_checkpoints_are_listed_although_find_fails(trained: Path, tmp_path: Path) -> None:
    """find fails if a folder is deleted while it lists."""
    find = tmp_path / "bin/find"
    find.parent.mkdir()
    find.write_text('#!/bin/sh\n/usr/bin/find "$@"\nexit 1\n')
    find.chmod(0o755)
    environment = {**os.environ, "PATH": f"{find.parent}:{os.environ['PATH']}"}
    bash = f"SCRIPTS={SCRIPTS}; source $SCRIPTS/common.sh; checkpoints_of"
    for run, code, output in ((trained, 0, "step-00000040"), (tmp_path, 2, "has no checkpoints")):
        listed = subprocess.run(["bash", "-c", f"{bash} {run}"], env=environment, capture_output=True, text=True)
        assert (listed.returncode, output in listed.stdout + listed.stderr) == (code, True)


def test_status_lists_the_jobs_of_a_run(stubs: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs/igpt_s"
    commands = [f"pretrain_s.sh --run {run} --seed 1", "pretrain_s.sh", "pretrain_s.sh --run /else", "pretrain_m.sh"]
    queue = "".join(f"{number:10} {'igpt':80} /slurm/{command}\n" for number, command in enumerate(commands))
    (tmp_path / "stubs/squeue").write_text(f"#!/bin/sh\ncat <<E\n{queue}E\n")
    (tmp_path / "stubs/squeue").chmod(0o755)
    for runs, listed in ((run.parent, ["0", "1"]), ("", ["0"])):
        environment = {**os.environ, "RUNS": str(runs)}
        command = [SCRIPTS / "status.sh", run]
        shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        assert [line.split()[0] for line in shown.splitlines()[2:]] == listed


@pytest.mark.parametrize(
    ("variables", "limit", "set_by_site"),
    [
        ({}, 3, 5),
        ({"MAX_FAILURES": "9"}, 9, 9),
        ({"MAX_ACCIDENTS": "7"}, 7, 5),
        ({"MAX_FAILURES": "9", "MAX_ACCIDENTS": "7"}, 9, 9),
    ],
    ids=str,
)
def test_the_limit_of_failures_has_an_earlier_name(
    variables: dict[str, str], limit: int, set_by_site: int, tmp_path: Path
) -> None:
    """Earlier versions of site.sh read the environment, unless they are edited to set the variable."""
    earlier, here = tmp_path / "site.sh", 'source "$SCRIPTS/site.sh"\n'
    bash = f'SCRIPTS={SCRIPTS}; source $SCRIPTS/common.sh; echo "$MAX_FAILURES"'
    for text, expected in (
        (here, limit),
        ("MAX_ACCIDENTS=${MAX_ACCIDENTS:-3}\n", limit),
        ("MAX_ACCIDENTS=5\n", set_by_site),
        (f"{here}MAX_ACCIDENTS=5\n", set_by_site),
    ):
        earlier.write_text(text)
        environment = {**os.environ, **variables, "SITE_FILE": str(earlier)}
        shown = subprocess.run(["bash", "-c", bash], env=environment, capture_output=True, text=True, check=True)
        assert shown.stdout.strip() == str(expected), text


@pytest.mark.parametrize(
    ("script", "arguments", "sbatch_options", "commands"),
    [
        (
            "evaluate.sh",
            ["--shards=SHARDS", "--out", "OUT", "--tasks", "density,knn"],
            "--gpus-per-node=h100:2 --array=0-3",
            [
                "  3: python -m torch.distributed.run --standalone --nproc_per_node=2 -m -- pipeline evaluate "
                "RUN/checkpoints/step-00000040 --out OUT/step-00000040 --tasks knn --shards=SHARDS"
            ],
        ),
        (
            "publish.sh",
            ["--to=hub:ORG/NAME"],
            "--partition=cpu",
            ["python -m pipeline publish RUN/checkpoints/step-00000040 --to=hub:ORG/NAME"],
        ),
        (
            "prepare_shards.sh",
            ["--source.path=my images", "--out", "OUT"],
            "--partition=cpu",
            [
                "  4: python -m data_prep shards --run RUN '--source.path=my images' --out OUT --part 4 --parts 4",
                "sbatch --partition=cpu --dependency=afterok:THE_ARRAY",
                "python -m data_prep join OUT",
            ],
        ),
    ],
    ids=["evaluate", "publish", "prepare_shards"],
)
@pytest.mark.parametrize("option", ["--dry-run", "--test"])
def test_a_script_prints_what_it_would_submit(
    option: str,
    script: str,
    arguments: list[str],
    sbatch_options: str,
    commands: list[str],
    sbatch: Path,
    tmp_path: Path,
) -> None:
    site, run = tmp_path / "site.sh", tmp_path / "run"
    site.write_text(
        'source "$SCRIPTS/site.sh"\nexport SBATCH_ACCOUNT=vision\n'
        "SITE_EVALUATE=(--gpus-per-node=h100:2) SITE_CPU=(--partition=cpu)\n"
    )
    for step in (20, 40):
        (run / f"checkpoints/step-000000{step}").mkdir(parents=True)
    finished = subprocess.run(
        [SCRIPTS / script, option, "--run", run, *arguments],
        env={**os.environ, "SITE_FILE": str(site), "SITE_PYTHON": sys.executable}, capture_output=True, text=True,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    shown = finished.stdout.replace(str(run), "RUN").replace(sys.executable, "python")
    for command in commands:
        assert command in shown
    assert f": sbatch {sbatch_options} {SCRIPTS / script} --run RUN" in shown
    assert "SBATCH_ACCOUNT=vision" in shown
    [asked] = sbatch.read_text().splitlines()
    assert asked.startswith(f"--test-only {sbatch_options} "), "nothing is submitted"
