"""A real SLURM of four nodes on this machine (tests/slurm/cluster), and jobs on it through sbatch."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launch import ROOT
from tests.pipeline.conftest import runner, shards

__all__ = ["Cluster", "cluster", "job_scripts", "runner", "shards"]
SCRIPTS = ROOT / "slurm"
PATIENCE = 120.0
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def job_scripts() -> list[Path]:
    return sorted(path for path in SCRIPTS.glob("*.sh") if path.read_text().startswith("#!") and path.stem != "status")


class Cluster:
    """sbatch and the other clients, as on a login node."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def client(self, name: str, *arguments: object, **variables: str) -> str:
        """What a client prints, with these variables besides ours."""
        command = [str(self.folder / "bin" / name), *map(str, arguments)]
        environment = {**os.environ, "SITE_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables}
        finished = subprocess.run(
            command, capture_output=True, text=True, timeout=60, env=environment, cwd=self.folder / "jobs"
        )
        assert finished.returncode == 0, f"{command}: {finished.stderr}"
        return finished.stdout

    def submit(self, script: str, *arguments: object, options: tuple[str, ...] = (), **variables: str) -> str:
        """The job's number."""
        return self.client("sbatch", "--parsable", *options, SCRIPTS / script, *arguments, **variables).strip()

    def job(self, number: str) -> dict[str, str]:
        """`scontrol show job`, by key."""
        shown = self.client("scontrol", "--oneliner", "show", "job", number)
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def until(self, condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> None:
        """Waits for the condition."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{what} did not happen in {seconds:.0f} s\n{self.client('squeue')}"
            time.sleep(0.2)

    def until_ended(self, number: str, seconds: float = PATIENCE) -> str:
        """Waits for the job's end. Returns the state."""
        self.until(lambda: self.job(number)["JobState"] in ENDED, f"the end of job {number}", seconds)
        return self.job(number)["JobState"]

    def node(self, what: str, number: int) -> None:
        """off, on, unplug or plug a node."""
        subprocess.run(["bash", str(CLUSTER_SCRIPTS / "node.sh"), str(self.folder), what, str(number)], check=True)

    def log(self, number: str) -> str:
        """What the job printed, over all its starts."""
        return "".join(path.read_text() for path in (self.folder / "jobs").glob(f"*-{number}.txt"))


CLUSTER_SCRIPTS = Path(__file__).parent / "cluster"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four nodes; skipped where there is no root, or SLURM can't be installed."""
    if os.geteuid() != 0:
        pytest.skip("a SLURM of our own needs root, for namespaces")
    if shutil.which("apt-get") is None and shutil.which("slurmctld") is None:
        pytest.skip("there is no slurmctld, and no apt-get to install it with")
    folder = Path("/tmp") / f"igpt-slurm-{os.getpid()}"  # short: munge's socket has a name of 107 characters at most
    environment = {**os.environ, "CLUSTER_DIR": str(folder), "CLUSTER_GPUS": "0"}
    start = ["bash", str(CLUSTER_SCRIPTS / "start_cluster.sh"), "4"]
    try:
        subprocess.run(start, env=environment, capture_output=True, text=True, timeout=400, check=True)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"SLURM did not start: {error.stderr[-500:]}")
    except subprocess.TimeoutExpired:
        pytest.skip("SLURM did not start in 400 s")
    (folder / "jobs").mkdir()
    try:
        yield Cluster(folder)
    finally:
        subprocess.run(["bash", str(CLUSTER_SCRIPTS / "stop_cluster.sh")], env=environment)
        shutil.rmtree(folder, ignore_errors=True)
