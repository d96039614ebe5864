"""What all job scripts have in common, without a SLURM."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import SCRIPTS, job_scripts


@pytest.mark.parametrize("script", job_scripts(), ids=lambda path: path.stem)
def test_options_of_sbatch_stand_before_the_first_command(script: Path) -> None:
    """sbatch ignores later ones without a word."""
    lines = script.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not [line for line in lines[first:] if line.startswith("#SBATCH")]


@pytest.mark.parametrize("script", job_scripts(), ids=lambda path: path.stem)
def test_without_slurm_a_script_says_what_it_is(script: Path) -> None:
    finished = subprocess.run(["bash", script, "--run", "/none"], capture_output=True, text=True)
    assert finished.returncode == 2
    assert "submit it with sbatch" in finished.stderr


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What was submitted, a line each: an sbatch that only writes down its arguments stands first in PATH."""
    submitted, stub = tmp_path / "submitted.txt", tmp_path / "bin/sbatch"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/sh\necho "$@" >>{submitted}\necho 7\n')
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stub.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SITE_PYTHON", sys.executable)
    return submitted


def test_what_follows_a_run_is_submitted_once_for_each_thing_asked(sbatch: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for folder in ("logs", "checkpoints/step-00000040"):
        (run / folder).mkdir(parents=True)

    def follow(published: str) -> str:
        bash = f"SCRIPTS={SCRIPTS}; source $SCRIPTS/common.sh; source $SCRIPTS/lib/followup.sh; follow_up {run} 2>&1"
        variables = {**os.environ, "PUBLISH": published}
        return subprocess.run(["bash", "-c", bash], env=variables, capture_output=True, text=True, check=True).stdout

    follow("")
    for published in ("dir:one", "dir:one", "dir:two"):
        said = follow(published)
        assert published in said, "what is not done again is said"
    assert [line.split()[-1] for line in sbatch.read_text().splitlines()] == ["dir:one", "dir:two"]


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What was started, a line each: SLURM's clients and a Python that only write down their arguments."""
    started, folder = tmp_path / "started.txt", tmp_path / "stubs"
    folder.mkdir()
    for name in ("srun", "scontrol", "python", "sbatch", "container"):
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
        ({"SLURM_NTASKS": "3"}, "--nodes=2 --ntasks=4 --ntasks-per-node=2"),
        ({}, "--nodes=2 --ntasks=2 --ntasks-per-node=1"),
    ],
    ids=["tasks per node", "accelerators", "tasks", "nodes alone"],
)
def test_a_job_starts_a_process_a_rank_on_neighbors(
    granted: dict[str, str], nodes_and_ranks: str, stubs: Path, tmp_path: Path
) -> None:
    site = {"SITE_RUNS": str(tmp_path / "runs"), "SITE_SHARDS": "/shards"}
    script = [SCRIPTS / "pretrain_xl.sh", "--model.layers", "2"]
    subprocess.run(script, env={**os.environ, **JOB, **site, **granted}, check=True)
    [ranks] = [line for line in stubs.read_text().splitlines() if line.startswith("srun")]
    assert f"{nodes_and_ranks} --distribution=block:block" in ranks
    train = (
        f"train --config {SCRIPTS.parent}/configs/igpt_xl.yaml --run {tmp_path}/runs/igpt_xl --data.shards /shards/64"
    )
    assert ranks.endswith(f"-m pipeline {train} --model.layers 2"), "the site's paths, where none are given"


JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "PREFLIGHT_SECONDS": "0"}
ARRAY = {
    "SLURM_ARRAY_JOB_ID": "7",
    "SLURM_ARRAY_TASK_ID": "0",
    "SLURM_ARRAY_TASK_MIN": "0",
    "SLURM_ARRAY_TASK_COUNT": "1",
}


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A run with a checkpoint."""
    (tmp_path / "run/checkpoints/step-00000040").mkdir(parents=True)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("script", "arguments", "started"),
    [
        ("pretrain_s.sh", "--run RUN", ["srun", "-m pipeline train", "-m pipeline status"]),
        ("evaluate.sh", "--run RUN --shards SHARDS --out OUT", ["-m pipeline evaluate"]),
        ("publish.sh", "--run RUN --to dir:OUT", ["-m pipeline publish"]),
        ("prepare_shards.sh", "--out OUT", ["sbatch", "-m data_prep join", "-m data_prep shards"]),
    ],
)
def test_what_a_site_prepares_is_how_python_is_started(
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


def test_checkpoints_are_those_that_are_listed_however_the_listing_ends(trained: Path, tmp_path: Path) -> None:
    """find fails where a folder is deleted while it lists."""
    find = tmp_path / "bin/find"
    find.parent.mkdir()
    find.write_text('#!/bin/sh\n/usr/bin/find "$@"\nexit 1\n')
    find.chmod(0o755)
    environment = {**os.environ, "PATH": f"{find.parent}:{os.environ['PATH']}"}
    bash = f"SCRIPTS={SCRIPTS}; source $SCRIPTS/common.sh; checkpoints_of"
    for run, code, said in ((trained, 0, "step-00000040"), (tmp_path, 2, "holds no checkpoints")):
        listed = subprocess.run(["bash", "-c", f"{bash} {run}"], env=environment, capture_output=True, text=True)
        assert (listed.returncode, said in listed.stdout + listed.stderr) == (code, True)


def test_status_lists_the_jobs_of_a_run(stubs: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs/igpt_s"
    commands = [f"pretrain_s.sh --run {run} --seed 1", "pretrain_s.sh", "pretrain_s.sh --run /else", "pretrain_m.sh"]
    queue = "".join(f"{number:10} {'igpt':80} /slurm/{command}\n" for number, command in enumerate(commands))
    (tmp_path / "stubs/squeue").write_text(f"#!/bin/sh\ncat <<E\n{queue}E\n")
    (tmp_path / "stubs/squeue").chmod(0o755)
    for runs, listed in ((run.parent, ["0", "1"]), ("", ["0"])):
        environment = {**os.environ, "SITE_RUNS": str(runs)}
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
    """Earlier versions of site.sh take that of the environment, unless they are edited to set one plainly."""
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
            ["--source.path=my pictures", "--out", "OUT"],
            "--partition=cpu",
            [
                "  4: python -m data_prep shards --run RUN '--source.path=my pictures' --out OUT --part 4 --parts 4",
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
        'source "$SCRIPTS/site.sh"\nexport SBATCH_ACCOUNT=vision SITE_PYTHON=python\n'
        "SITE_EVALUATE=(--gpus-per-node=h100:2) SITE_CPU=(--partition=cpu)\n"
    )
    for step in (20, 40):
        (run / f"checkpoints/step-000000{step}").mkdir(parents=True)
    finished = subprocess.run(
        [SCRIPTS / script, option, "--run", run, *arguments],
        env={**os.environ, "SITE_FILE": str(site)}, capture_output=True, text=True,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    said = finished.stdout.replace(str(run), "RUN")
    for command in commands:
        assert command in said
    assert f": sbatch {sbatch_options} {SCRIPTS / script} --run RUN" in said
    assert "SBATCH_ACCOUNT=vision" in said
    [asked] = sbatch.read_text().splitlines()
    assert asked.startswith(f"--test-only {sbatch_options} "), "nothing is submitted"
