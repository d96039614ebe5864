"""Kills runs at random moments and resumes them, until a number of kills: python -m tests.soak --kills 50 --seed 0

Half of the runs stay on one topology: their losses must be bit-equal to those of an uninterrupted run. The others
resume on a random topology each time: their losses must agree within 1e-5. After every kill, every committed
checkpoint must be complete. With --killed_on all runs are killed on one topology, and after each kill continue on
another one, each in turn, until they are asked to stop.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import count, cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.checkpoint.format import PARTIAL, committed, open_checkpoint
from tests.launch import run, start
from tests.pipeline.conftest import Runner

STEPS, IMAGES = 240, 8
SETTINGS: dict[str, Any] = {
    "batch__global_size": IMAGES,
    "batch__micro_size": 2,
    "schedule__steps": STEPS,
    "schedule__decay": "constant",
    "optimizer__learning_rate": 0.002,
    "checkpoint__every_steps": 7,
    "validation__every_steps": 1000,
    "model__dropout": 0.0,
}
TOPOLOGIES = {  # ranks, ZeRO stage, pipeline stages, tensor parallelism
    "1 rank": (1, 1, 1, 1),
    "Z1x2": (2, 1, 1, 1),
    "Z2x2": (2, 2, 1, 1),
    "Z3x2": (2, 3, 1, 1),
    "PP2": (2, 1, 2, 1),
    "tp2": (2, 1, 1, 2),
    "tp2xPP2": (4, 1, 2, 2),
}
METHODS = ("kill all", "kill one", "USR1", "STOP file")
MOMENTS = ("anywhere", "during a save", "during the load")
TIMEOUT = 600.0
TOLERANCE = 1e-5


class Failed(AssertionError):
    """An invariant does not hold."""


class Soak:
    """Kills runs, resumes them, checks them, and counts what it did."""

    def __init__(self, runner: Runner, seed: int, killed_on: str | None) -> None:
        self.runner, self.draw, self.killed_on = runner, random.Random(seed), killed_on
        self.others = cycle(name for name in TOPOLOGIES if name != killed_on)
        self.counts: Counter[str] = Counter()
        self.kills, self.unfinished_saves, self.largest = 0, 0, 0.0

    def round(self, name: str, mixed: bool, kills: int) -> None:
        """One run from its start to its last step; at most `kills` starts are killed."""
        home = self.killed_on or self.draw.choice(list(TOPOLOGIES))
        killed = 0
        for number in count():
            topology = self.topology(home, mixed, number)
            uninterrupted = killed >= kills
            codes = self.start_once(name, topology, uninterrupted)
            self.check_checkpoints(name)
            if codes and set(codes) == {0}:
                break
            if uninterrupted:
                raise Failed(f"{name} on {topology} ended with {codes}: {self.logs(name)}")
            if -signal.SIGKILL in codes:
                killed += 1
                self.kills += 1
        self.check_rows(name, home, mixed)

    def topology(self, home: str, mixed: bool, number: int) -> str:
        """Of this start of a run."""
        if self.killed_on:
            return home if number % 2 == 0 else next(self.others)
        return self.draw.choice(list(TOPOLOGIES)) if mixed else home

    def methods(self, topology: str) -> tuple[str, ...]:
        """How a start may be ended."""
        if self.killed_on:
            return METHODS[:2] if topology == self.killed_on else ("STOP file",)
        return METHODS[:2] * 2 + METHODS[2:]

    def start_once(self, name: str, topology: str, uninterrupted: bool) -> list[int]:
        """Starts or resumes the run and, unless `uninterrupted`, ends it at a random moment. Returns the exit codes."""
        ranks, zero, stages, parts = TOPOLOGIES[topology]
        settings = SETTINGS | {
            "parallel__zero_stage": zero,
            "parallel__pipeline_stages": stages,
            "parallel__tensor_parallel": parts,
            "checkpoint__asynchronous": self.draw.random() < 0.7,
        }
        method, moment = self.draw.choice(self.methods(topology)), self.draw.choice(MOMENTS)
        processes = start(ranks, *self.runner.arguments(name, **settings), logs=self.runner.folder / "logs" / name)
        try:
            if not uninterrupted:
                self.await_moment(self.runner.folder / name, moment, processes)
                self.end(processes, method, self.runner.folder / name)
            codes = self.codes(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if not uninterrupted:
            unfinished = list((self.runner.folder / name / "checkpoints").glob(f"*{PARTIAL}"))
            self.unfinished_saves += bool(unfinished)
            self.counts[f"{method}, {moment}"] += set(codes) != {0}
            self.log(f"{name} on {topology}: {method}, {moment}: codes {codes}{', in a save' * bool(unfinished)}")
        return codes

    def codes(self, processes: list[subprocess.Popen[bytes]]) -> list[int]:
        """The exit codes of all ranks. As under srun --kill-on-bad-exit, those that still run 20 s after the
        first failure are killed.
        """
        until = time.monotonic() + TIMEOUT
        while any(process.poll() is None for process in processes) and time.monotonic() < until:
            if any(process.poll() not in (None, 0, 75) for process in processes):
                until = min(until, time.monotonic() + 20)
            time.sleep(0.01)
        hung = [process for process in processes if process.poll() is None]
        if hung and all(process.poll() in (None, 0, 75) for process in processes):
            raise Failed(f"a rank is still running after {TIMEOUT:.0f} s")
        for process in hung:
            process.kill()
        return [process.wait() for process in processes]

    def await_moment(self, folder: Path, moment: str, processes: list[subprocess.Popen[bytes]]) -> None:
        began, rows = time.monotonic(), folder / "metrics.jsonl"
        before = rows.stat().st_size if rows.exists() else 0

        def alive() -> bool:
            return all(process.poll() is None for process in processes) and time.monotonic() - began < TIMEOUT

        def until(condition: Callable[[], bool]) -> None:
            while alive() and not condition():
                time.sleep(0.002)

        if moment == "during the load":
            time.sleep(self.draw.uniform(2, 6))
            return
        until(lambda: rows.exists() and rows.stat().st_size != before)
        if moment == "during a save":
            for _ in range(self.draw.randint(1, 4)):
                until(lambda: not list((folder / "checkpoints").glob(f"*{PARTIAL}")))
                until(lambda: bool(list((folder / "checkpoints").glob(f"*{PARTIAL}"))))
            time.sleep(self.draw.uniform(0, 0.03))
        else:
            time.sleep(self.draw.uniform(0, 2))

    def end(self, processes: list[subprocess.Popen[bytes]], method: str, folder: Path) -> None:
        if method == "kill all":
            for process in processes:
                process.send_signal(signal.SIGKILL)
        elif method == "kill one":
            self.draw.choice(processes).send_signal(signal.SIGKILL)
        elif method == "USR1" and (folder / "metrics.jsonl").exists():  # before that Python's own handler ends it
            self.draw.choice(processes).send_signal(signal.SIGUSR1)
        elif folder.exists():
            (folder / "STOP").touch()
        else:
            processes[0].send_signal(signal.SIGKILL)

    def check_checkpoints(self, name: str) -> None:
        """Every committed checkpoint is complete."""
        for folder in committed(self.runner.folder / name / "checkpoints"):
            damage = open_checkpoint(folder).damage()
            if damage is not None:
                raise Failed(f"{folder} is committed but damaged: {damage}")

    def check_rows(self, name: str, home: str, mixed: bool) -> None:
        """No step and no image is lost or repeated, and the losses are those of an uninterrupted run."""
        reference = f"uninterrupted {home}"
        if not (self.runner.folder / reference).exists():
            ranks, zero, stages, parts = TOPOLOGIES[home]
            settings = SETTINGS | {"parallel__zero_stage": zero, "parallel__pipeline_stages": stages}
            self.runner.check_trains(reference, ranks, **settings, parallel__tensor_parallel=parts)
        rows, wanted = ([r for r in self.runner.rows(n) if "loss" in r] for n in (name, reference))
        if [row["step"] for row in rows] != list(range(1, STEPS + 1)):
            raise Failed(f"{name}: steps {[row['step'] for row in rows]}")
        if [row["images"] for row in rows] != [IMAGES * step for step in range(1, STEPS + 1)]:
            raise Failed(f"{name}: images are lost or repeated")
        difference = max(abs(a["loss"] - b["loss"]) for a, b in zip(rows, wanted, strict=True))
        if difference > (TOLERANCE if mixed else 0):
            raise Failed(f"{name}: a loss differs by {difference} from {reference}")
        self.largest = max(self.largest, difference)
        self.log(f"{name}: {STEPS} steps, {'mixed topologies' if mixed else home}: largest difference {difference:.2g}")

    def logs(self, name: str) -> str:
        return "\n".join(path.read_text()[-2000:] for path in sorted((self.runner.folder / "logs" / name).iterdir()))

    def log(self, message: str) -> None:
        print(f"{self.kills:4} kills  {message}", flush=True)


def soak(folder: Path, kills: int, seed: int, topologies: str, killed_on: str | None) -> Soak:
    """Kills this many starts, as described above. Raises Failed."""
    shards = folder / "shards"
    options = ["--source.kind=photographs", "--source.train_per_class=30", "--source.test_per_class=4"]
    done = run(
        1, "-m", "data_prep", "shards", *options, "--resolution=8", f"--out={shards}", logs=folder / "logs/shards"
    )
    assert done.codes == [0], done.output
    state = Soak(Runner(shards, folder), seed, killed_on)
    number = 0
    while state.kills < kills:
        mixed = killed_on is not None or topologies == "mixed" or (topologies == "both" and number % 2 == 1)
        state.round(f"run-{number}", mixed, min(kills - state.kills, 8))
        number += 1
    return state


def main() -> None:
    """Parses the options, runs the test and prints a summary."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--topologies", choices=("same", "mixed", "both"), default="both")
    parser.add_argument("--killed_on", choices=tuple(TOPOLOGIES))
    chosen = parser.parse_args()
    if chosen.killed_on and chosen.topologies != "both":
        parser.error("--killed_on and --topologies exclude each other")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    began = time.monotonic()
    with TemporaryDirectory() as name:
        try:
            state = soak(Path(name), chosen.kills, chosen.seed, chosen.topologies, chosen.killed_on)
        except Failed as error:
            sys.exit(f"FAILED: {error}")
    print(json.dumps(dict(sorted(state.counts.items())), indent=2))
    print(
        f"{state.kills} kills, {state.unfinished_saves} of them left an unfinished save; no step was lost or repeated, "
        f"no committed checkpoint was damaged; largest difference of a loss {state.largest:.2g}; "
        f"{time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
