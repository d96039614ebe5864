"""Ends a run that hangs, and reports where: each rank monitors its own progress, because a hung rank can't answer."""

import faulthandler
import json
import logging
import os
import re
import shutil
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TextIO

from data_prep.common.command_line import print_error
from pipeline.checkpoint.run_folder import RunFolder
from pipeline.distributed import Ranks
from pipeline.train.health.gil_guard import GilGuard

logger = logging.getLogger(__name__)

STACKS = "stacks"
SLOW_PHASE_FACTOR = 3
"""How many times the limit the first step (it compiles and connects) and phases other than a step may take."""
LONGEST_SUSPENSION = timedelta(days=14)
"""For how long a job may be suspended without an error."""
STEP_PHASES = ("reading", "exchanging flags", "training")
"""Phases of a step; other phases, and the first step, may take SLOW_PHASE_FACTOR times as long."""
GRACE_SECONDS = 5.0
"""Seconds between writing this rank's stacks and reading those of the other ranks."""
OVERSLEPT_SECONDS = 5.0
"""If the watchdog's own thread sleeps so much too long, the process did not run."""
COLLECTIVES = 12
"""Number of last collectives to write after the stacks."""


def start_timeout(minutes: float) -> timedelta:
    """The timeout of collectives until the watchdog runs; minutes: the limit of a step, 0 for no limit."""
    return timedelta(minutes=SLOW_PHASE_FACTOR * minutes + 5) if minutes else timedelta(365)


def group_timeout(minutes: float) -> timedelta:
    """The timeout of collectives while the watchdog runs, longer than its limits; minutes: as above.

    At least LONGEST_SUSPENSION, because a collective's timeout also runs while a job is suspended, unlike the
    watchdog's.
    """
    return max(start_timeout(minutes), LONGEST_SUSPENSION)


class Watchdog:
    """A thread that ends this process with code 1 if the loop does not `enter` a new phase for too long.

    First it writes the stacks of all threads, and the last collectives, to RUN/stacks; the lowest rank that is alive
    reports which ranks are behind. If code that holds the GIL does not return, no thread can run: then another process
    (gil_guard.py) has the stacks written to standard error a little later, and the process ended.

    Time for which the process did not run does not count: it was suspended (SIGSTOP, SLURM's PreemptMode=SUSPEND), or
    held by code that does not release the GIL.
    """

    def __init__(self, folder: RunFolder, ranks: Ranks, minutes: float) -> None:
        """minutes: how long a step may take; 0 disables the watchdog."""
        self._folder, self._ranks, self._seconds = folder, ranks, 60 * minutes
        self._stacks = folder.path / STACKS
        self._step, self._phase, self._since = 0, "starting", time.monotonic()
        self._limit = SLOW_PHASE_FACTOR * self._seconds
        self._first_step: int | None = None
        self._ended = threading.Event()
        if ranks.is_first:
            shutil.rmtree(self._stacks, ignore_errors=True)
        self._tick = min(5.0, self._seconds / 10)
        if minutes:
            self._guard = GilGuard(self._seconds + 3 * GRACE_SECONDS)
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def enter(self, phase: str, step: int) -> None:
        """Records that the loop has started a phase ("reading", "training", "saving" ...) of a step."""
        if self._first_step is None and phase in STEP_PHASES:  # the loaded step may be evaluated before
            self._first_step = step
        ordinary = phase in STEP_PHASES and self._first_step is not None and step > self._first_step
        self._step, self._phase, self._since = step, phase, time.monotonic()  # before the limit, which may shrink
        self._limit = self._seconds if ordinary else SLOW_PHASE_FACTOR * self._seconds

    def end(self) -> None:
        """Stops the watchdog."""
        self._ended.set()
        if self._seconds:
            self._guard.close()

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(self._tick):
            self._guard.beat()
            last, slept = time.monotonic(), time.monotonic() - last
            if slept > self._tick + OVERSLEPT_SECONDS:
                self._since = min(last, self._since + slept - self._tick)  # a phase may have begun since
                if self._ranks.is_first:
                    logger.warning(
                        f"this process did not run for {slept:.0f} s (suspended, or held by other code), which does "
                        f"not count as a hang"
                    )
            if last - self._since > self._limit:
                try:
                    self._abort()
                except OSError as error:
                    print_error(error, f" (no progress in {self._phase}; the stacks could not be written)")
                finally:
                    os._exit(1)

    def _abort(self) -> None:
        phase, waited = f"{self._phase} at step {self._step}", time.monotonic() - self._since
        self._stacks.mkdir(exist_ok=True)
        with self._file(self._ranks.rank).open("w") as file:
            file.write(f"rank {self._ranks.rank}, {phase}, for {waited:.0f} s\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            try:
                write_collectives(file)
            except Exception as error:  # a private part of torch that may change; the report must be written anyway
                file.write(f"the last collectives can't be read: {type(error).__name__}: {error}\n")
        time.sleep(min(GRACE_SECONDS, self._seconds))
        phases = {rank: self._phase_of(rank) for rank in range(self._ranks.count)}
        if self._ranks.rank == min(rank for rank, known in phases.items() if known is not None):
            message = f"no progress for {waited:.0f} s: {describe(phases)}; the stacks are in {self._stacks}."
            failure = TimeoutError(message)
            self._folder.note_failure(failure)
            print_error(failure)

    def _file(self, rank: int) -> Path:
        return self._stacks / f"rank-{rank:05d}.txt"

    def _phase_of(self, rank: int) -> str | None:
        """The phase in a rank's stacks file, or None if it wrote none."""
        with suppress(OSError):
            if found := re.match(r"rank \d+, (.*), for", self._file(rank).read_text()):
                return found[1]
        return None


def write_collectives(file: TextIO) -> None:
    """Writes this rank's last collectives from torch's flight recorder, the newest last.

    The rank that is behind has a smaller number in a group than the others, or another collective at the same number.
    The recorder is on by default, for gloo and NCCL; TORCH_FR_BUFFER_SIZE=0 turns it off.
    """
    from torch._C import _distributed_c10d as recorder

    entries = []
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):  # NCCL's groups have a recorder of their own
        if dump := getattr(recorder, name, None):
            entries += json.loads(dump()).get("entries", [])
    file.write("\nlast collectives\n")
    for entry in sorted(entries, key=lambda entry: entry.get("time_created_ns", 0))[-COLLECTIVES:]:
        state = "done" if entry.get("retired") else entry.get("state")
        group = " ".join(entry.get("process_group", []))
        sizes = entry.get("input_sizes")
        file.write(
            f"  group {group} number {entry.get('collective_seq_id')}: {entry.get('profiling_name')} {sizes} {state}\n"
        )


def describe(phases: dict[int, str | None]) -> str:
    """Which ranks are in which phase: the silent ranks first, then the smallest group."""
    groups: dict[str | None, list[int]] = {}
    for rank, phase in phases.items():
        groups.setdefault(phase, []).append(rank)
    parts = []
    for phase, ranks in sorted(groups.items(), key=lambda item: (item[0] is not None, len(item[1]))):
        names = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
        one = len(ranks) == 1
        parts.append(
            f"{names} {'does' if one else 'do'} not respond (stopped, dead, or disconnected)"
            if phase is None
            else f"{names} {'hangs' if one else 'hang'} in {phase}"
        )
    return ", ".join(parts)
