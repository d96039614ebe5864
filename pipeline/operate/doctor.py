"""python -m pipeline doctor: checks this machine's packages, disk and network, and that a small run can be resumed.

For the trial, two ranks train a tiny model on images that come with the packages. They are killed after a checkpoint.
The run resumes on one rank, and a copy of it on two pipeline stages. Both must have the losses of an uninterrupted run.
"""

import multiprocessing
import os
import platform
import runpy
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from math import inf
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from data_prep.common.command_line import new_parser, parse
from pipeline.checkpoint.metrics_log import METRICS_FILE, read_rows
from pipeline.compilers import missing_compiler

REQUIREMENTS = Path(__file__).parents[2] / "requirements.txt"
TOLERANCE = 1e-5
"""Largest difference of a loss after the run resumed on another topology."""
STEPS, SAVE_EVERY = 30, 10
LAUNCH_SECONDS = 180
PRELOADED = ["pipeline.train.loop", "pipeline.train.engine.zero", "pipeline.train.engine.pipeline"]
"""Modules of the trial's ranks that take seconds to import."""
MIN_SHARED_MEMORY = 1e9
MIN_DISK = 20e9


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    status: Literal["ok", "note", "FAIL"]
    text: str
    """What was found and, if the check failed, what to do."""


def doctor_command(arguments: list[str]) -> int:
    """Prints the findings and a summary. Returns 0 if all checks passed, 1 if not."""
    parser = new_parser(
        "python -m pipeline doctor", "Checks whether this machine can train, and whether a run can be resumed on it."
    )
    parser.add_argument("--folder", type=str, default=".", help="Folder for runs; its disk is checked.")
    parser.add_argument("--quick", action="store_true", help="Skip the trial run, which takes a minute or two.")
    chosen = parse(parser, arguments)
    folder = Path(chosen.folder)
    if not folder.is_dir():
        raise ValueError(
            f"--folder is {chosen.folder!r}, which is not a folder; name the folder in which runs will be saved."
        )
    failed = []
    for what, finding in examine(folder, trial=not chosen.quick):
        print(f"{finding.status:<4}  {what:<14} {finding.text}", flush=True)
        failed += [what] if finding.status == "FAIL" else []
    if failed:
        print(f"\nfailed: {', '.join(failed)}; their lines above show what to do.")
        return 1
    print("\nall checks passed" + (", without the trial run (--quick skipped it)." if chosen.quick else "."))
    return 0


def examine(folder: Path, trial: bool) -> Iterator[tuple[str, Finding]]:
    """The name and the finding of each check, one after the other. A check that raises an error has failed."""
    checks: dict[str, Callable[[], Finding]] = {
        "machine": _system,
        "packages": _packages,
        "accelerators": _accelerators,
        "compilers": _compilers,
        "/dev/shm": _shared_memory,
        "disk": lambda: _disk(folder),
        "file system": lambda: _renames(folder),
        "network": _network,
        "SLURM": _slurm,
    }
    if trial:
        checks["trial"] = lambda: try_out(folder)
    for what, check in checks.items():
        try:
            yield what, check()
        except (OSError, ValueError, ImportError, RuntimeError, subprocess.SubprocessError) as error:
            yield what, Finding("FAIL", f"could not be checked: {error}")


def _system() -> Finding:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return Finding(
        "ok",
        f"{os.cpu_count()} cores, {memory:.0f} GB, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}",
    )


def _packages() -> Finding:
    wrong = []
    lines = REQUIREMENTS.read_text().splitlines() if REQUIREMENTS.is_file() else []
    for line in (line.split("#")[0].split(";")[0].strip() for line in lines):
        name, _, wanted = line.partition("==")
        if not wanted:
            continue
        try:
            found = version(name.partition("[")[0])
        except PackageNotFoundError:
            found = "missing"
        if found.partition("+")[0] != wanted:
            wrong.append(f"{name} is {found}, not {wanted}")
    if wrong:
        return Finding("FAIL", f"{'; '.join(wrong)}: pip install -r requirements.txt")
    return Finding("ok", "as in requirements.txt")


def _accelerators() -> Finding:
    import torch

    from pipeline.model.numerics import bf16_is_slow

    if not torch.cuda.is_available():
        advice = ", which needs precision fp32 to be fast" if bf16_is_slow(torch.device("cpu")) else ""
        return Finding("note", f"none that torch {torch.__version__} can use; runs will use the CPU{advice}")
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    free = [torch.cuda.mem_get_info(number)[0] / 1e9 for number in range(len(names))]
    return Finding("ok", "; ".join(f"{name}, {left:.0f} GB free" for name, left in zip(names, free, strict=True)))


def _compilers() -> Finding:
    path = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool, path=path) is None]
    notes = []
    if missing:
        notes.append(f"{' and '.join(missing)} missing: parallel.offload cannot be used, nor compile on CPUs")
    import torch

    reason = missing_compiler("cuda") if torch.cuda.is_available() else None
    if reason:
        notes.append(f"runs on accelerators are not compiled, which is slower: {reason}")
    if notes:
        return Finding("note", "; ".join(notes))
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it found no accelerator
    from deepspeed.ops.op_builder import AsyncIOBuilder

    nvme = "and libaio: parallel.nvme_path too" if AsyncIOBuilder().is_compatible() else "but no libaio for NVMe"
    return Finding("ok", f"g++ and ninja: parallel.offload and compile can be used; {nvme}")


def _shared_memory() -> Finding:
    size = shutil.disk_usage("/dev/shm").total
    if size < MIN_SHARED_MEMORY:
        return Finding("note", f"{size / 1e9:.2f} GB: NCCL may need 1 GB (docker run --shm-size)")
    return Finding("ok", f"{size / 1e9:.0f} GB")


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    text = f"{free / 1e9:.0f} GB free in {folder.resolve()}"
    if free < MIN_DISK:
        return Finding("note", f"{text}: a checkpoint takes 12 bytes a parameter, and a run keeps two or three")
    return Finding("ok", text)


def _renames(folder: Path) -> Finding:
    """A checkpoint is complete once its temporary folder is renamed, so renaming a folder must be atomic."""
    with TemporaryDirectory(dir=folder) as name:
        temporary, final = Path(name, "temporary"), Path(name, "final")
        temporary.mkdir()
        with (temporary / "file").open("wb") as file:
            file.write(b"x" * 4096)
            began = time.perf_counter()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - began
        temporary.rename(final)
        if temporary.exists() or (final / "file").stat().st_size != 4096:
            return Finding("FAIL", f"{folder} does not rename folders atomically; save runs on another file system")
    return Finding("ok", f"renames folders, flushes a file in {1000 * seconds:.1f} ms")


def _network() -> Finding:
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return Finding("note", f"{name} has no address: set MASTER_ADDR to a numeric address for runs on several nodes")
    chosen = {key: os.environ[key] for key in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if key in os.environ}
    return Finding("ok", f"{name} is {address}" + (f"; {chosen}" if chosen else ""))


def _slurm() -> Finding:
    if shutil.which("sbatch") is None:
        return Finding("note", "sbatch is not installed: start runs with torchrun")
    answer = subprocess.run(["sinfo", "--noheader"], capture_output=True, text=True, timeout=20)
    if answer.returncode:
        return Finding("note", "sbatch is installed, but no controller answers: start runs with torchrun")
    return Finding("ok", f"{len(answer.stdout.splitlines())} partitions and states (sinfo)")


def try_out(folder: Path) -> Finding:
    """Trains on two ranks, kills them after a checkpoint, and resumes on other topologies."""
    began = time.monotonic()
    with TemporaryDirectory(dir=folder, prefix=".doctor-") as name:
        trial = _Trial(Path(name))
        trial.prepare()
        trial.finish("uninterrupted", ranks=2)
        trial.kill_after_a_save("killed")
        shutil.copytree(trial.folder / "killed", trial.folder / "staged")
        trial.finish("killed", ranks=1)
        trial.finish("staged", ranks=2, stages=2)
        expected = trial.losses("uninterrupted")
        for run in ("killed", "staged"):
            found = trial.losses(run)
            difference = largest_difference(found, expected)
            if len(found) != STEPS or not difference <= TOLERANCE:
                return Finding(
                    "FAIL",
                    f"a run that was killed and resumed has {len(found)} of {STEPS} steps, and its losses differ by up "
                    f"to {difference:.2g}: do not train here before you know why",
                )
    return Finding(
        "ok",
        f"on the CPU: saved on 2 ranks, killed, resumed on 1 rank and on 2 stages, with the losses of an uninterrupted "
        f"run ({time.monotonic() - began:.0f} s)",
    )


def largest_difference(found: list[float | None], expected: list[float | None]) -> float:
    """The largest difference between losses of the same step; infinite if one of the two was NaN or Inf."""
    pairs = zip(found, expected, strict=False)
    return max((inf if a is None or b is None else abs(a - b) for a, b in pairs), default=0.0)


class _Trial:
    """Training processes in a temporary folder, on the CPU: forks of one process that has imported all packages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "OMPI_"))}
        self._environment = inherited | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        self._context = multiprocessing.get_context("forkserver")

    def prepare(self) -> None:
        """Writes a small shard set."""
        options = ["--source.kind=photographs", "--source.train_per_class=20", "--source.test_per_class=2"]
        arguments = ["shards", *options, "--resolution=8", f"--out={self.folder / 'shards'}"]
        self._start_server()
        self._check("preparing images", self._start("data_prep", arguments, ranks=1))

    def finish(self, run: str, ranks: int, stages: int = 1) -> None:
        """Trains to the last step. Raises ValueError with the last line of a rank that fails."""
        self._check(f"a run on {ranks} ranks", self._train(run, ranks, stages))

    def kill_after_a_save(self, run: str) -> None:
        """Starts two ranks, and kills them as soon as a checkpoint is complete."""
        processes = self._train(run, ranks=2)
        end = time.monotonic() + LAUNCH_SECONDS
        while not list((self.folder / run / "checkpoints").glob("step-????????")):
            if time.monotonic() > end or any(process.exitcode is not None for process in processes):
                self._check("the run to be killed", processes)
                raise ValueError("a run ended, or saved no checkpoint, before it could be killed.")
            time.sleep(0.005)
        for process in processes:
            process.kill()
            process.join()

    def losses(self, run: str) -> list[float | None]:
        """The loss of every training step; None if it was NaN or Inf."""
        return [row["loss"] for row in read_rows(self.folder / run / METRICS_FILE) if "loss" in row]

    def _train(self, run: str, ranks: int, stages: int = 1) -> list[BaseProcess]:
        keys = {
            "data.shards": self.folder / "shards",
            "model.layers": 2,
            "model.width": 32,
            "model.heads": 2,
            "model.resolution": 8,
            "schedule.steps": STEPS,
            "schedule.warmup_steps": 4,
            "batch.global_size": 8,
            "batch.micro_size": 4,
            "parallel.pipeline_stages": stages,
            "precision": "fp32",
            "checkpoint.every_steps": SAVE_EVERY,
            "validation.every_steps": STEPS,
            "samples.every_steps": 0,
        }
        options = [f"--{key}={value}" for key, value in keys.items()]
        return self._start("pipeline", ["train", f"--run={self.folder / run}", *options], ranks)

    def _start_server(self) -> None:
        """Starts the process that is forked; libraries read some variables while they are imported."""
        own = dict(os.environ)
        self._context.set_forkserver_preload(PRELOADED)
        try:
            os.environ.clear()
            os.environ.update(self._environment)
            forkserver.ensure_running()
        finally:
            os.environ.clear()
            os.environ.update(own)

    def _start(self, package: str, arguments: list[str], ranks: int) -> list[BaseProcess]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        processes: list[BaseProcess] = []
        for rank in range(ranks):
            launch = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            launch |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | self._environment
            process = self._context.Process(
                target=_run_command, args=(package, arguments, launch, self.folder / f"rank-{rank}.log")
            )
            process.start()
            processes.append(process)
        return processes

    def _check(self, what: str, processes: list[BaseProcess]) -> None:
        end = time.monotonic() + LAUNCH_SECONDS
        try:
            for process in processes:
                process.join(max(0.0, end - time.monotonic()))
        finally:
            codes = [process.exitcode for process in processes]
            for process in processes:
                process.kill()
        if None in codes:
            raise ValueError(f"{what} took more than {LAUNCH_SECONDS} s.")
        if any(codes):
            rank = next(rank for rank, code in enumerate(codes) if code)
            lines = (self.folder / f"rank-{rank}.log").read_text().strip().splitlines()
            raise ValueError(f"{what} ended with {codes}: {lines[-1] if lines else 'it printed nothing'}")


def _run_command(package: str, arguments: list[str], environment: dict[str, str], log: Path) -> None:
    """In a new process: `python -m PACKAGE ARGUMENTS` in this environment, with its output in a log."""
    with log.open("wb") as file:
        for standard in (1, 2):
            os.dup2(file.fileno(), standard)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [package, *arguments]
    runpy.run_module(package, run_name="__main__", alter_sys=True)
