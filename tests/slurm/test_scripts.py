"""The other job scripts, and what all have in common."""

import subprocess
from pathlib import Path

import pytest

from tests.launch import files_of, run
from tests.slurm.conftest import SCRIPTS, Cluster

OPTIONS = ["--source.kind=photographs", "--source.train_per_class=30", "--source.test_per_class=4", "--resolution=8"]


def job_scripts() -> list[Path]:
    return sorted(path for path in SCRIPTS.glob("*.sh") if path.read_text().startswith("#!") and path.stem != "status")


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


def test_slurm_takes_every_script(cluster: Cluster) -> None:
    for script in job_scripts():
        cluster.client("sbatch", "--test-only", "--nodes=2", script)


def test_an_array_prepares_a_set_and_joins_it(cluster: Cluster, tmp_path: Path) -> None:
    palette, out = tmp_path / "palette.npy", tmp_path / "shards"
    for command in (["palette", "--out", palette], ["shards", "--palette.file", palette, "--out", tmp_path / "whole"]):
        finished = run(1, "-m", "data_prep", *command, *OPTIONS, logs=tmp_path / "logs")
        assert finished.codes == [0], finished.output
    options = ("--array=1-3", "--cpus-per-task=1")
    cluster.submit("prepare_shards.sh", *OPTIONS, "--palette.file", palette, "--out", out, options=options)
    cluster.until(lambda: (out / "shards.json").is_file() and not (out / "unfinished").exists(), "the join")
    assert files_of(out) == files_of(tmp_path / "whole")
