"""The job scripts without a SLURM: stubs record what they start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import JOB, SCRIPTS, job_scripts


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


@pytest.mark.parametrize(
    ("granted", "nodes_and_ranks"),
    [
        ({"SLURM_NTASKS_PER_NODE": "2"}, "--nodes=2 --ntasks=4 --ntasks-per-node=2"),
        ({"SLURM_GPUS_ON_NODE": "8", "ACCELERATORS_PER_NODE": "8"}, "--nodes=2 --ntasks=16 --ntasks-per-node=8"),
        ({"SLURM_GPUS_ON_NODE": "8", "ACCELERATORS_PER_NODE": "4"}, "--nodes=2 --ntasks=8 --ntasks-per-node=4"),
        ({"SLURM_GPUS_ON_NODE": "8"}, "--nodes=2 --ntasks=16 --ntasks-per-node=8"),
        ({"SLURM_GPUS_ON_NODE": "8", "ACCELERATORS_PER_NODE": "0"}, "--nodes=2 --ntasks=2 --ntasks-per-node=1"),
        ({"SLURM_NTASKS": "4"}, "--nodes=2 --ntasks=4 --ntasks-per-node=2"),
        (
            {"SLURM_GPUS": "16", "SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS": "16"},
            "--nodes=2 --ntasks=16 --ntasks-per-node=8",
        ),
        (
            {"SLURM_GPUS": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_NTASKS_PER_NODE": "4"},
            "--nodes=2 --ntasks=8 --ntasks-per-node=4",
        ),
        ({"SLURM_GPUS": "a100:2,h100:2", "SLURM_GPUS_ON_NODE": "2"}, "--nodes=2 --ntasks=4 --ntasks-per-node=2"),
        ({}, "--nodes=2 --ntasks=2 --ntasks-per-node=1"),
    ],
    ids=[
        *("tasks per node", "accelerators", "fewer", "granted", "CPUs", "tasks", "all accelerators"),
        *("more tasks than accelerators", "two types", "nodes alone"),
    ],
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


def test_a_mixture_replaces_the_sites_shard_set(stubs: Path, tmp_path: Path) -> None:
    """As an option, or in a recipe; a comment in the recipe, as of igpt_xl, does not."""
    mixture = '[{"shards":"/a","weight":1}]'
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data:\n  mixture:\n    - {shards: /a, weight: 1}\n")
    site = {"RUNS": str(tmp_path / "runs"), "SHARDS": "/shards"}
    for options in (["--data.mixture", mixture], [f"--data.mixture={mixture}"], ["--config", str(recipe)]):
        subprocess.run([SCRIPTS / "pretrain_xl.sh", *options], env={**os.environ, **JOB, **site}, check=True)
    ranks = [line for line in stubs.read_text().splitlines() if line.startswith("srun") and "-m pipeline train" in line]
    assert len(ranks) == 3
    assert not any("--data.shards" in line for line in ranks)


@pytest.mark.parametrize(
    ("recipe", "given"),
    [
        ("data:\n  reflect_crop: 0\nprobe:\n  shards: /labelled\n", True),
        ("data: {reflect_crop: 0} # shards: /none\nprobe: {shards: /labelled}\n", True),
        ("probe:\n  shards: /labelled\ndata:\n  # a comment\n  shards: /own\n", False),
        ("data: {shards: /own}\n", False),
    ],
)
def test_only_sets_below_data_replace_the_sites(recipe: str, given: bool, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe)
    words = f'for lib in {SCRIPTS}/lib/*.sh; do . "$lib"; done; RUNS=/runs SHARDS=/sets'
    words += f'; set_training_options train {tmp_path}/recipe.yaml; echo "${{TRAINING[*]}}"'
    done = subprocess.run(["bash", "-O", "extglob", "-c", words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("--data.shards /sets" in done.stdout) == given


@pytest.mark.parametrize(
    ("granted", "sentence"),
    [
        ({"SLURM_NTASKS": "3"}, "the job has 3 tasks (--ntasks) on 2 nodes; each node must run as many: give sbatch"),
        ({"SLURM_NTASKS": "3", "SLURM_GPUS_ON_NODE": "2"}, "the job has 3 tasks (--ntasks) on 2 nodes"),
        ({"SLURM_GPUS": "h100:3", "SLURM_GPUS_ON_NODE": "2"}, "the job has 3 accelerators (--gpus) on 2 nodes"),
    ],
    ids=["tasks", "tasks on accelerators", "accelerators"],
)
def test_a_job_whose_nodes_would_run_different_numbers_of_ranks_is_refused(
    granted: dict[str, str], sentence: str, stubs: Path
) -> None:
    script = [SCRIPTS / "pretrain_s.sh", "--run", stubs.parent / "run", "--data.shards", "/none"]
    finished = subprocess.run(script, env={**os.environ, **JOB, **granted}, capture_output=True, text=True)
    assert finished.returncode == 2
    assert [line for line in finished.stderr.splitlines() if line.startswith(f"error: {sentence}")]
    assert not stubs.exists() or "srun" not in stubs.read_text()


@pytest.mark.parametrize(
    ("granted", "node", "cpus", "threads"),
    [
        ({"SLURM_JOB_CPUS_PER_NODE": "96(x2)", "SLURM_GPUS_ON_NODE": "8"}, 96, 12, 8),
        ({"SLURM_JOB_CPUS_PER_NODE": "104,52(x3)", "SLURM_GPUS_ON_NODE": "4"}, 52, 12, 8),
        ({"SLURM_CPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "2"}, 8, 4, 4),
        ({"SLURM_CPUS_ON_NODE": "8", "SLURM_GPUS_ON_NODE": "8"}, 8, 1, 1),
        ({"SLURM_CPUS_ON_NODE": "96", "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "11"}, 96, 11, 11),
        ({"SLURM_CPUS_ON_NODE": "96", "SLURM_GPUS_ON_NODE": "8", "OMP_NUM_THREADS": "2"}, 96, 12, 2),
        ({}, 1, 1, 1),
    ],
    ids=["equal parts", "complete cores of the smaller nodes", "few", "one each", "explicit", "own threads", "unknown"],
)
def test_the_ranks_of_a_node_share_its_cpus(
    granted: dict[str, str], node: int, cpus: int, threads: int, stubs: Path
) -> None:
    """The health check, one process a node, gets all of them."""
    srun = stubs.parent / "stubs/srun"
    srun.write_text(f'#!/bin/sh\necho "$OMP_NUM_THREADS $@" >>{stubs}\n')
    job = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"} | JOB | granted
    script = [SCRIPTS / "pretrain_s.sh", "--run", stubs.parent / "run", "--data.shards", "/none"]
    subprocess.run(script, env=job, check=True)
    [ranks] = [line.split() for line in stubs.read_text().splitlines() if "--distribution" in line]
    assert ranks[0] == str(threads)
    assert f"--cpus-per-task={cpus}" in ranks
    checks = f"{SCRIPTS}/lib/nodes.sh; PREFLIGHT_SECONDS=9 ACCELERATORS_PER_NODE=0; preflight node1"
    bash = f"SCRIPTS={SCRIPTS}; source $SCRIPTS/common.sh; source {checks}"
    subprocess.run(["bash", "-c", bash], env=job, check=True)
    [check] = [line.split() for line in stubs.read_text().splitlines() if "--kill-on-bad-exit=0" in line]
    assert f"--cpus-per-task={node}" in check


@pytest.mark.parametrize(("accelerators", "threads"), [("", "8"), ("1", "8"), ("4", "2")])
def test_the_ranks_of_an_evaluation_share_its_cpus(accelerators: str, threads: str, stubs: Path, trained: Path) -> None:
    (stubs.parent / "stubs/python").write_text(f'#!/bin/sh\necho "$OMP_NUM_THREADS $@" >>{stubs}\n')
    job = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"} | JOB | ARRAY
    granted = {"SLURM_GPUS_ON_NODE": accelerators, "SLURM_CPUS_ON_NODE": "8", "SLURM_JOB_CPUS_PER_NODE": "8"}
    script = [SCRIPTS / "evaluate.sh", "--run", trained, "--shards", "/none", "--out", "/none"]
    subprocess.run(script, env=job | granted, check=True)
    assert stubs.read_text().splitlines()[-1].split()[0] == threads


def test_the_health_checks_have_time_for_the_first_import_of_torch() -> None:
    bash = f"SCRIPTS={SCRIPTS}; source $SCRIPTS/common.sh; echo $PREFLIGHT_SECONDS"
    site = {key: value for key, value in os.environ.items() if key != "PREFLIGHT_SECONDS"}
    shown = subprocess.run(["bash", "-c", bash], env=site, capture_output=True, text=True, check=True).stdout
    assert shown == "180\n"
    assert "| `PREFLIGHT_SECONDS` | 180 |" in (SCRIPTS / "README.md").read_text()


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


def test_functions_of_earlier_scripts_exist() -> None:
    """SLURM keeps a copy of a queued job's script, which sources the present lib/."""
    script = "mapfile -d '' -t rest < <(without '--a' --a 1 --b '2 3'); typed \"${rest[@]}\""
    command = ["bash", "-c", f"source {SCRIPTS}/lib/arguments.sh; {script}"]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.stdout == "--b '2 3'\n"
