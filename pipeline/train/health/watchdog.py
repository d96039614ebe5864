"""Ends a run that hangs, and logs where: each rank watches its own progress, since a hung one can't be asked."""

import faulthandler
import json
import os
import re
import shutil
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import torch

from data_prep.common.command_line import print_error
from pipeline.checkpoint.run_folder import RunFolder
from pipeline.distributed import Ranks

STACKS = "stacks"
PATIENT = 3
"""Times the limit that the first step (it compiles and connects) and what is not a step may take."""
ORDINARY = ("reading", "exchanging read errors", "training")
"""Phases of every step; the others, and the first step, may take PATIENT times as long."""
GRACE_SECONDS = 5.0
"""Between writing one's own stacks and reading the others'."""
STANDARD_ERROR = 2
COLLECTIVES = 12
"""Of the last ones that are written below the stacks."""


def group_timeout(minutes: float) -> timedelta:
    """How long a collective may wait, where a step may hang for `minutes`: longer than any watchdog; 0 is for ever."""
    return timedelta(minutes=PATIENT * minutes + 5) if minutes else timedelta(days=365)


class Watchdog:
    """A thread that ends this process with code 1, if the loop does not `enter` a phase for too long.

    Before that it writes the stacks of all threads, and the last collectives, to RUN/stacks; the first rank that lives
    logs who is behind. Where code that holds Python's lock does not return, no thread runs any more: then faulthandler,
    which needs none, writes the stacks to standard error a little later and ends the process.
    """

    def __init__(self, folder: RunFolder, ranks: Ranks, minutes: float) -> None:
        """minutes: how long a step may take; 0 watches nothing."""
        self._folder, self._ranks, self._seconds = folder, ranks, 60 * minutes
        self._stacks = folder.path / STACKS
        self._step, self._phase, self._since = 0, "starting", time.monotonic()
        self._limit = PATIENT * self._seconds
        self._first_step: int | None = None
        self._ended = threading.Event()
        if ranks.is_first:
            shutil.rmtree(self._stacks, ignore_errors=True)
        if minutes:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def enter(self, phase: str, step: int) -> None:
        """Notes that the loop has come to a phase ("reading", "training", "saving" ...) of a step."""
        if self._first_step is None:
            self._first_step = step
        ordinary = phase in ORDINARY and step > self._first_step
        self._step, self._phase, self._since = step, phase, time.monotonic()  # first: the old wait has ended
        self._limit = self._seconds if ordinary else PATIENT * self._seconds
        if self._seconds:
            faulthandler.dump_traceback_later(self._limit + 3 * GRACE_SECONDS, exit=True, file=STANDARD_ERROR)

    def end(self) -> None:
        """Watches no longer."""
        faulthandler.cancel_dump_traceback_later()
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(min(5.0, self._seconds / 10)):
            if time.monotonic() - self._since > self._limit:
                try:
                    self._give_up()
                except OSError as error:
                    print_error(error, f" (no progress in {self._phase}; the stacks could not be written)")
                finally:
                    os._exit(1)

    def _give_up(self) -> None:
        place, waited = f"{self._phase} at step {self._step}", time.monotonic() - self._since
        self._stacks.mkdir(exist_ok=True)
        with self._file(self._ranks.rank).open("w") as file:
            file.write(f"rank {self._ranks.rank}, {place}, for {waited:.0f} s\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            try:
                write_collectives(file)
            except Exception as error:  # a part of torch that may change; who is behind must be logged all the same
                file.write(f"the last collectives can't be read: {type(error).__name__}: {error}\n")
        time.sleep(min(GRACE_SECONDS, self._seconds))
        places = {rank: self._place_of(rank) for rank in range(self._ranks.count)}
        if self._ranks.rank == min(rank for rank, known in places.items() if known is not None):
            message = f"no progress for {waited:.0f} s: {describe(places)}; the stacks are in {self._stacks}."
            failure = TimeoutError(message)
            self._folder.note_failure(failure)
            print_error(failure)

    def _file(self, rank: int) -> Path:
        return self._stacks / f"rank-{rank:05d}.txt"

    def _place_of(self, rank: int) -> str | None:
        """What a rank wrote of where it is, or None if it wrote nothing."""
        with suppress(OSError):
            if found := re.match(r"rank \d+, (.*), for", self._file(rank).read_text()):
                return found[1]
        return None


def write_collectives(file: TextIO) -> None:
    """Writes the last collectives of this rank as torch's flight recorder holds them, the newest last.

    The rank that is behind has a smaller number in a group than the others, or another collective at the same one.
    The recorder, gloo's and NCCL's alike, is on where no one sets TORCH_FR_BUFFER_SIZE to 0.
    """
    from torch._C import _distributed_c10d as recorder

    # What NCCL's groups did is a record of its own.
    dump = getattr(recorder, "_dump_nccl_trace_json" if torch.cuda.is_available() else "_dump_fr_trace_json", None)
    if dump is None:
        return
    file.write("\nlast collectives\n")
    for entry in json.loads(dump()).get("entries", [])[-COLLECTIVES:]:
        state = "done" if entry.get("retired") else entry.get("state")
        group = " ".join(entry.get("process_group", []))
        sizes = entry.get("input_sizes")
        file.write(
            f"  group {group} number {entry.get('collective_seq_id')}: {entry.get('profiling_name')} {sizes} {state}\n"
        )


def describe(places: dict[int, str | None]) -> str:
    """Who is where: the silent ranks first, then the smallest group."""
    groups: dict[str | None, list[int]] = {}
    for rank, place in places.items():
        groups.setdefault(place, []).append(rank)
    parts = []
    for place, ranks in sorted(groups.items(), key=lambda item: (item[0] is not None, len(item[1]))):
        names = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
        one = len(ranks) == 1
        parts.append(
            f"{names} {'is' if one else 'are'} silent (stopped, dead, or cut off)"
            if place is None
            else f"{names} {'hangs' if one else 'hang'} in {place}"
        )
    return ", ".join(parts)
