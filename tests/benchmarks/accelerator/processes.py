"""What is a process of its own in a run: preflight, a stop by SIGUSR1, and the watchdog's end of a hang."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.benchmarks.accelerator.common import CUDA, free_memory, write_shards
from tests.benchmarks.accelerator.report import Row, equal, known

STOPPED, ENDED_BY_WATCHDOG = 75, 1
SECONDS = 75.0
"""For one process, from its start."""
GRACE = 10.0
"""Seconds in which a killed process ends."""
HANGING = "hanging"
HANG = """
import sys, time, torch
from pathlib import Path
from pipeline.checkpoint.run_folder import RunFolder
from pipeline.distributed import describe_ranks
from pipeline.train.engine.process_group import start_group
from pipeline.train.health.watchdog import Watchdog

ranks = describe_ranks()
start_group(ranks)
watchdog = Watchdog(RunFolder(Path(sys.argv[1])), ranks, 0.02)
watchdog.enter("training", 1)
watchdog.enter("training", 2)
if ranks.device.type == "cuda":
    torch.cuda._sleep(10**11)  # about a minute
    torch.cuda.synchronize()
else:
    time.sleep(60)
"""
"""A run that hangs in its second step, in a call into the driver on CUDA."""


def train_options(folder: Path, shards: Path) -> list[str]:
    """A run that would take hours, and saves when it is stopped."""
    options = {
        "run": folder,
        "data.shards": shards,
        "model.layers": 2,
        "model.width": 64,
        "model.heads": 2,
        "model.resolution": 8,
        "schedule.steps": 1_000_000,
        "schedule.warmup_steps": 4,
        "batch.global_size": 8,
        "batch.micro_size": 4,
        "checkpoint.every_steps": 500_000,
        "samples.every_steps": 0,
    }
    return [f"--{key}={value}" for key, value in options.items()]


def check_preflight() -> Iterator[Row]:
    """The check of a node before it trains: accelerators, the run's disk, the shard set."""
    free_memory()  # this process's cached memory would be found in use
    with tempfile.TemporaryDirectory() as folder:
        run, log = Path(folder) / "run", Path(folder) / "preflight.log"
        run.mkdir()
        words = ["preflight", "--nodes", "here", "--accelerators", str(int(CUDA))]
        words += train_options(run, write_shards(Path(folder) / "shards", 64, 8))
        with running(["-m", "pipeline", *words], {**alone(), "SLURMD_NODENAME": "here"}, log) as process:
            code = process.wait(SECONDS)
        text = log.read_text()
    yield equal("preflight: exit code", code, 0)
    report = json.loads(next(line for line in text.splitlines() if line.startswith("{")))
    yield equal("preflight: faults", report["faults"], {})
    yield equal("preflight: all-reduce", report["all_reduce_ok"], True)


@dataclass
class Processes:
    """A run that will be stopped, and one that hangs; they start while the engines are checked."""

    folder: Path
    options: list[str]
    train: "subprocess.Popen[bytes]"
    hang: "subprocess.Popen[bytes]"
    end: ExitStack
    """Ends both and removes the folder."""


@cache
def processes() -> Processes:
    """Starts both, once."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        (folder / HANGING).mkdir()
        options = train_options(folder / "run", write_shards(folder / "shards", 64, 8))
        words = ["-m", "pipeline", "train", *options]
        train = stack.enter_context(running(words, alone(), folder / "train.log"))
        hang = stack.enter_context(running(["-c", HANG, str(folder / HANGING)], alone(), folder / "hang.log"))
        return Processes(folder, options, train, hang, stack.pop_all())


def start_processes() -> Iterator[Row]:
    """The start of what `check_stop_and_watchdog` follows."""
    yield known("processes: started", f"{processes().train.pid} and {processes().hang.pid}")


def check_stop_and_watchdog() -> Iterator[Row]:
    """A run that SIGUSR1 stops and saves, then resumes; beside it a hanging one, which its watchdog ends."""
    found = processes()
    run = found.folder / "run"
    with found.end:
        yield from _check_stop(found.train, run)
        steps = len(rows(run)) + 5
        words = ["-m", "pipeline", "train", *found.options, f"--schedule.steps={steps}"]
        with running(words, alone(), found.folder / "resumed.log") as train:
            yield equal("stop and watchdog: exit code of the resumed run", train.wait(SECONDS), 0)
        yield equal("stop and watchdog: steps of the resumed run", rows(run)[-1]["step"], steps)
        yield equal("stop and watchdog: exit code of the hanging run", found.hang.wait(SECONDS), ENDED_BY_WATCHDOG)
        stacks = [path.read_text() for path in found.folder.glob(f"{HANGING}/stacks/rank-*.txt")]
        yield equal("stop and watchdog: stacks written", ["training at step 2" in text for text in stacks], [True])


def _check_stop(train: "subprocess.Popen[bytes]", run: Path) -> Iterator[Row]:
    wait_for(lambda: len(rows(run)) >= 3, train)
    yield known("stop and watchdog: losses", ", ".join(f"{row['loss']:.3f}" for row in rows(run)[:3]))
    train.send_signal(signal.SIGUSR1)
    yield equal("stop and watchdog: exit code after SIGUSR1", train.wait(SECONDS), STOPPED)
    saved = [path.name for path in run.glob("checkpoints/step-*[0-9]")]
    yield equal("stop and watchdog: checkpoint", saved, [f"step-{rows(run)[-1]['step']:08d}"])


def rows(run: Path) -> list[dict[str, float]]:
    """The steps of a run so far."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in found if "loss" in row]


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    """Until the condition holds. Raises RuntimeError if the process ends before, or takes too long."""
    end = time.monotonic() + SECONDS
    while not condition():
        if process.poll() is not None:
            raise RuntimeError(f"the process ended with code {process.returncode} before that")
        if time.monotonic() > end:
            raise RuntimeError(f"the process took more than {SECONDS:g} s")
        time.sleep(0.1)


@contextmanager
def running(arguments: list[str], environment: dict[str, str], log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Python with these arguments; kills it at the end if it still runs, and prints its log.

    It is in the supervisor's group, so that it ends with it too.
    """
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, *arguments], env=environment, stdout=file, stderr=file)
    try:
        yield process
    finally:
        if process.poll() is None:
            print(f"-- {log.name}: had to be killed; its signals: {signals_of(process.pid)}", flush=True)
        process.kill()
        with suppress(subprocess.TimeoutExpired):  # a driver may never let go
            process.wait(GRACE)
        print(f"-- {log.name}\n{log.read_text()}", flush=True)


def signals_of(process: int) -> str:
    """The signals that a process has pending, blocks, ignores and handles, as /proc says: masks, by thread."""
    found = []
    for status in sorted(Path(f"/proc/{process}/task").glob("*/status")):
        with suppress(OSError):  # the thread has ended
            lines = [line.split() for line in status.read_text().splitlines()]
            words = " ".join(f"{line[0]} {line[1]}" for line in lines if line[0].startswith(("Sig", "ShdPnd")))
            found.append(f"{lines[0][1]} {words}")
    return "; ".join(found[:8])


def alone() -> dict[str, str]:
    """The environment of a process of one rank: without what this process's own group has set."""
    of_group = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {key: value for key, value in os.environ.items() if key not in of_group}
