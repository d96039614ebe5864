"""A real SLURM of eight nodes on this machine (tests/slurm/cluster), and a tiny training run for its jobs."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launch import ROOT
from tests.pipeline.conftest import Runner, runner, shards

__all__ = ["Cluster", "Training", "cluster", "job_scripts", "runner", "shards", "training", "uninterrupted"]
SCRIPTS = ROOT / "slurm"
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "PREFLIGHT_SECONDS": "0"}
"""Variables of a job, for scripts that run without SLURM."""
CLUSTER_SCRIPTS = Path(__file__).parent / "cluster"
NODES, ACCELERATORS = 8, 8
NO_CLUSTER = 3
"""The exit code of start_cluster.sh where no cluster is possible."""
TIMEOUT = 600.0
"""Seconds that a busy machine may take; far less than the 20 minutes after which a run ends a hang itself."""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
SITE = {"SITE_PYTHON": sys.executable, "ACCELERATORS_PER_NODE": "0"}
TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2")
SIZES = {
    "model__size": "null",
    "schedule__steps": 250,
    "batch__micro_size": 2,
    "checkpoint__every_steps": 40,
    "checkpoint__keep_last": 2,
}


def job_scripts() -> list[Path]:
    return sorted(path for path in SCRIPTS.glob("*.sh") if path.read_text().startswith("#!") and path.stem != "status")


class Cluster:
    """sbatch and the other clients, as on a login node."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def client(self, name: str, *arguments: object, **variables: str) -> str:
        """The output of a client, started with these variables. Jobs run on CPUs: the accelerators are only listed."""
        command = [str(self.folder / "bin" / name), *map(str, arguments)]
        environment = {**os.environ, **SITE, "OMP_NUM_THREADS": "1", **variables}
        finished = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT, env=environment, cwd=self.folder / "jobs"
        )
        assert finished.returncode == 0, f"{command}: {finished.stderr}"
        return finished.stdout

    def submit(self, script: str, *arguments: object, options: tuple[str, ...] = (), **variables: str) -> str:
        """The job's number."""
        return self.client("sbatch", "--parsable", *options, SCRIPTS / script, *arguments, **variables).strip()

    def run_script(self, script: str, *arguments: object, **variables: str) -> str:
        """The output of a script that is started on the login node itself."""
        environment = {**os.environ, **SITE, **variables}
        environment["PATH"] = f"{self.folder / 'bin'}:{environment['PATH']}"
        finished = subprocess.run(
            [SCRIPTS / script, *map(str, arguments)], capture_output=True, text=True, timeout=TIMEOUT, env=environment
        )
        assert finished.returncode == 0, finished.stderr
        return finished.stdout + finished.stderr

    def job(self, number: str) -> dict[str, str]:
        """`scontrol show job`, by key."""
        shown = self.client("scontrol", "--oneliner", "show", "job", number)
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def until(self, condition: Callable[[], Any], what: str, seconds: float = TIMEOUT) -> None:
        """Waits for the condition."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{what} did not happen in {seconds:.0f} s\n{self.client('squeue')}"
            time.sleep(0.3)

    def until_ended(self, number: str, seconds: float = TIMEOUT) -> str:
        """Waits for the job's end. Returns the state."""
        self.until(lambda: self.job(number)["JobState"] in ENDED, f"the end of job {number}", seconds)
        return self.job(number)["JobState"]

    def node(self, what: str, number: int) -> None:
        """off, on, unplug or plug a node. Waits until SLURM can use a node that is on again: the next test needs it."""
        subprocess.run(["bash", str(CLUSTER_SCRIPTS / "node.sh"), str(self.folder), what, str(number)], check=True)
        if what in ("on", "plug"):
            state = ("sinfo", "--noheader", "--partition=train", f"--nodes=node{number}", "--format=%t")
            self.until(lambda: self.client(*state).strip() in ("idle", "mix", "alloc"), f"the return of node{number}")

    def processes(self, pattern: str) -> list[int]:
        """Processes of this cluster whose command line matches, the oldest first."""
        found = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True).stdout.split()
        own = f"SLURM_CONF={self.folder}/slurm.conf".encode()
        return [int(number) for number in found if own in Path(f"/proc/{number}/environ").read_bytes()]

    def on_node(self, number: int, *command: str) -> None:
        """Runs a command in the network and mount namespaces of a node."""
        [daemon] = self.processes(f"slurmd -D -N node{number}$")
        subprocess.run(["nsenter", f"--target={daemon}", "--mount", "--net", "--", *command], check=True)

    def stop_controller(self) -> None:
        """As when its machine fails."""
        for daemon in self.processes("^slurmctld"):
            os.kill(daemon, signal.SIGKILL)

    def start_controller(self) -> None:
        """It restores the state that it saved."""
        init = (self.folder / "run/init.pid").read_text().strip()
        command = ["env", f"SLURM_CONF={self.folder}/slurm.conf", "slurmctld"]
        spaces = ["--net", "--uts", "--mount", "--pid"]
        subprocess.run(["nsenter", f"--target={init}", *spaces, "--", *command], check=True, capture_output=True)

    def log(self, number: str) -> str:
        """The output of the job, over all its starts."""
        return "".join(path.read_text() for path in (self.folder / "jobs").glob(f"*-{number}.txt"))


def start_slurm(folder: Path) -> None:
    """Starts the cluster. Skips where none is possible; fails if it should start and does not."""
    start = ["timeout", "900", "bash", str(CLUSTER_SCRIPTS / "start_cluster.sh"), str(NODES)]
    environment = {**os.environ, "CLUSTER_DIR": str(folder), "CLUSTER_GPUS": str(ACCELERATORS)}
    finished = subprocess.run(start, env=environment, capture_output=True, text=True)
    if finished.returncode == NO_CLUSTER:
        pytest.skip(" ".join(finished.stderr[-500:].split()))
    if finished.returncode != 0:
        pytest.fail(f"SLURM did not start (code {finished.returncode}):\n{finished.stdout}{finished.stderr}")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The running cluster; skipped without root."""
    if os.geteuid() != 0:
        pytest.skip("the SLURM cluster needs root, for namespaces")
    folder = Path("/tmp") / f"igpt-slurm-{os.getpid()}"  # short: munge's socket has a name of 107 characters at most
    try:
        start_slurm(folder)
        (folder / "jobs").mkdir()
        yield Cluster(folder)
    finally:
        stop = ["bash", str(CLUSTER_SCRIPTS / "stop_cluster.sh")]
        subprocess.run(stop, env={**os.environ, "CLUSTER_DIR": str(folder)})
        shutil.rmtree(folder, ignore_errors=True)


class Training:
    """One run of the tiny model by slurm/pretrain_s.sh."""

    def __init__(self, cluster: Cluster, runner: Runner, losses: list[float], name: str = "run") -> None:
        """losses: of an uninterrupted run."""
        self.cluster, self.runner, self.uninterrupted, self.name = cluster, runner, losses, name
        self.run = runner.folder / name
        self.job = ""

    def submit(self, *options: str, overrides: dict[str, Any] | None = None, **variables: str) -> None:
        """options: of sbatch, added to 2 nodes x 2 ranks; overrides: of train."""
        arguments = self.runner.arguments("run", **SIZES | (overrides or {}))[3:]
        self.job = self.cluster.submit("pretrain_s.sh", *arguments, options=(*TWO_BY_TWO, *options), **variables)

    def await_step(self, step: int) -> None:
        """Waits for the step to be recorded."""
        rows = self.run / "metrics.jsonl"
        self.cluster.until(lambda: rows.is_file() and len(rows.read_text().splitlines()) > step, f"step {step}")

    def ranks(self) -> list[int]:
        """Processes of the training, as this machine numbers them."""
        found = self.cluster.processes(f"pipeline train --config .* --run={self.run} ")
        return [number for number in found if "python" in Path(f"/proc/{number}/exe").resolve().name]

    def record(self) -> dict[str, Any]:
        """run.json."""
        return json.loads((self.run / "run.json").read_text())

    def log(self) -> str:
        """The output of the job."""
        return self.cluster.log(self.job)

    def nodes(self) -> list[int]:
        """Numbers of the nodes that the job runs on."""
        listed = self.cluster.client("scontrol", "show", "hostnames", self.cluster.job(self.job)["NodeList"])
        return [int(name.removeprefix("node")) for name in listed.split()]

    def restarts(self) -> int:
        return int(self.cluster.job(self.job)["Restarts"])

    def check_finishes(self, restarts: int | None = None, starts: int | None = None) -> None:
        """With the losses of an uninterrupted run, bit for bit. starts: of the training; by default restarts + 1."""
        state = self.cluster.until_ended(self.job)
        assert state == "COMPLETED", self.log()
        assert self.runner.losses(self.name) == self.uninterrupted
        assert self.record()["status"] == "finished"
        if restarts is not None:
            assert self.restarts() == restarts, self.log()
            assert len(self.record()["starts"]) == (restarts + 1 if starts is None else starts)


@pytest.fixture(scope="session")
def uninterrupted(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the same run on four ranks, without SLURM."""
    runner = Runner(shards, tmp_path_factory.mktemp("uninterrupted"))
    runner.check_trains("run", 4, **SIZES)
    return runner.losses("run")


@pytest.fixture
def training(cluster: Cluster, runner: Runner, uninterrupted: list[float]) -> Training:
    """Not yet submitted."""
    return Training(cluster, runner, uninterrupted)


def run_script(script: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Starts a script as a shell does, without the variables RUNS and SHARDS of this environment."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RUNS", "SHARDS")} | variables
    return subprocess.run([SCRIPTS / script, *map(str, arguments)], env=environment, capture_output=True, text=True)


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
