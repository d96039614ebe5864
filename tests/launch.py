"""Starts the command line as real processes: one, or several ranks with the variables that srun and torchrun set."""

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.fork_server import ENVIRONMENT, ForkServer, Program

ROOT = Path(__file__).parents[1]
SECONDS = 240


@dataclass
class Finished:
    """How the ranks ended: exit codes, and what each wrote to standard output and error together."""

    codes: list[int]
    outputs: list[str]

    @property
    def output(self) -> str:
        """What the first rank wrote."""
        return self.outputs[0]


def free_port() -> int:
    """One that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


Process = subprocess.Popen[bytes] | Program
fork_server: ForkServer | None = None
"""Set by the tests' conftest; benchmarks start fresh interpreters, as users do."""


def start(ranks: int, *arguments: object, logs: Path, fresh: bool = False) -> list[Process]:
    """Starts `python ARGUMENTS` on some ranks, each in a process group with the others, a log file each.

    fresh: with an interpreter that has imported nothing yet, as tests of memory and of imports want it.
    """
    logs.mkdir(parents=True, exist_ok=True)
    port = free_port()
    words = [str(argument) for argument in arguments]
    processes: list[Process] = []
    for rank in range(ranks):
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
        if ranks > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        group, log = processes[0].pid if processes else 0, logs / f"rank-{rank}.log"
        log.touch()
        if fork_server is not None and not fresh and fork_server.suits(environment):
            processes.append(fork_server.start(words, environment, log, group))
        else:
            processes.append(_start_fresh(words, environment, log, group))
    return processes


def _start_fresh(words: list[str], environment: dict[str, str], log: Path, group: int) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, *words], env=environment, stdout=file, stderr=subprocess.STDOUT, process_group=group
        )


def finish(processes: list[Process], logs: Path, seconds: float = SECONDS) -> Finished:
    """Waits for all ranks; ends them if they take too long."""
    try:
        codes = [process.wait(seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    outputs = [(logs / f"rank-{rank}.log").read_text() for rank in range(len(processes))]
    return Finished(codes, outputs)


def run(ranks: int, *arguments: object, logs: Path, seconds: float = SECONDS, fresh: bool = False) -> Finished:
    """Starts the ranks and waits for them."""
    return finish(start(ranks, *arguments, logs=logs, fresh=fresh), logs, seconds)


def files_of(folder: Path) -> dict[str, bytes]:
    """What a folder holds: the content of each file, by its path below it."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
