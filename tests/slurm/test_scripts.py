"""What all job scripts have in common, without a SLURM."""

import subprocess
from pathlib import Path

import pytest

from tests.slurm.conftest import job_scripts


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
