"""Starts Python programs by forks of a process that has imported torch, DeepSpeed and transformers already.

A program that starts so is a process of its own, in its own process group and with its own environment, and costs a
tenth of a second of CPU time instead of five. The forking process is the standard library's fork server. Two things are
left to fresh interpreters, in the SLURM tests and where a test asks for them: that imports work, and that nothing
depends on the order of a set, since forks share their hash seed.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path

PRELOADED = [
    "pipeline.train.loop",
    "pipeline.train.engine.zero",
    "pipeline.train.engine.pipeline",
    "torch.utils.tensorboard",
]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
"""What libraries read while they are imported."""
OF_A_RANK = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH"}
GROUP_SECONDS = 10.0


class ForkServer:
    """Forks programs from a server that starts with the first of them."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._environment: dict[str, str] | None = None
        self._programs: list[Program] = []

    def suits(self, environment: dict[str, str]) -> bool:
        """Whether a program of this environment may be forked: libraries read variables while they are imported."""
        if self._environment is None:
            with _environment({**os.environ, **ENVIRONMENT}):
                self._environment = _read_by_imports(os.environ)
                forkserver.ensure_running()
        return _read_by_imports(environment) == self._environment

    def start(self, arguments: list[str], environment: dict[str, str], log: Path, group: int) -> "Program":
        """As subprocess.Popen starts `python ARGUMENTS`: -m MODULE, or a file, and what follows."""
        process = self._context.Process(target=_run, args=(arguments, environment, str(Path.cwd()), str(log), group))
        process.start()
        self._programs.append(Program(process, arguments))
        return self._programs[-1]

    def close(self) -> None:
        """Ends what a failed test left running; the interpreter would wait for it at its end."""
        for program in self._programs:
            program.kill()


class Program:
    """What the tests use of subprocess.Popen."""

    def __init__(self, process: multiprocessing.process.BaseProcess, arguments: list[str]) -> None:
        assert process.pid is not None
        self._process, self.args, self.pid = process, arguments, process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        """The exit code, minus the number of the signal that ended it, or None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        """Nothing happens to a program that has ended."""
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Sends SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _read_by_imports(environment: Mapping[str, str]) -> dict[str, str]:
    """Without pytest's own variables, and those that a rank is given."""
    return {key: value for key, value in environment.items() if key not in OF_A_RANK and not key.startswith("PYTEST_")}


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    earlier = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(earlier)


def _join_group(group: int) -> None:
    """Joins the first rank's process group, which that rank may still have to make, or makes its own (0).

    A rank whose first rank has ended already is left in a group of its own.
    """
    end = time.monotonic() + GROUP_SECONDS
    while group and time.monotonic() < end and Path(f"/proc/{group}").exists():
        try:
            return os.setpgid(0, group)
        except PermissionError:
            time.sleep(0.01)
    return os.setpgid(0, 0)


def _run(arguments: list[str], environment: dict[str, str], folder: str, log: str, group: int) -> None:
    """In the new process: becomes `python ARGUMENTS`."""
    _join_group(group)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    kind, *rest = arguments
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(kind).parent))
        runpy.run_path(kind, run_name="__main__")
