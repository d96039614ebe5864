"""The supervisor: starts the worker, prints and writes its lines as they come, and keeps the time. Imports no torch."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.benchmarks.accelerator.parts import Part
from tests.benchmarks.accelerator.report import Row, failed, summary

GRACE = 5.0
"""Seconds after a part's deadline in which the worker may end itself; then it is killed."""
START_SECONDS = 90.0
"""Seconds in which a worker must begin its first part."""
RESERVE = 2.0
"""Seconds of the budget for ending."""
LOG, RESULTS, TABLES = "worker.log", "results.txt", "tables.md"


@dataclass
class Supervisor:
    """Runs parts in worker processes, within a number of seconds."""

    parts: Sequence[Part]
    worker: Sequence[str]
    """The command that starts a worker; the names of the parts, `end` and the pipe's number are appended."""
    out: Path
    """The folder of results, written as they come."""
    end: float
    """When everything must have ended, on the monotonic clock."""
    lines: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)

    def run(self) -> bool:
        """Runs all parts. Returns whether all checks are ok."""
        self.out.mkdir(parents=True, exist_ok=True)
        for name in (LOG, RESULTS, TABLES):
            (self.out / name).unlink(missing_ok=True)
        waiting, idle_starts = list(self.parts), 0
        while waiting and idle_starts < 2 and self.end - time.monotonic() > RESERVE:
            left = Worker(self, waiting).run()
            idle_starts = idle_starts + 1 if len(left) == len(waiting) else 0
            waiting = left
        for part in waiting:
            self.skip(part)
        self.write(RESULTS, summary(self.lines, self.not_run))
        return not any(line.startswith("FAIL") for line in self.lines)

    def add(self, row: Row, seconds: float) -> None:
        """Prints and writes a line."""
        self.lines.append(row.line(seconds))
        self.write(RESULTS, self.lines[-1])

    def skip(self, part: Part) -> None:
        """A check that did not run has failed; a measurement that did not run is named in the last line."""
        if part.required:
            self.add(failed(part.name, "not run for lack of time"), 0.0)
        else:
            self.not_run.append(part.name)

    def write(self, name: str, text: str) -> None:
        """Prints a text, and appends it to a file."""
        print(text, flush=True)
        with (self.out / name).open("a") as file:
            file.write(text + "\n")


class Worker:
    """One worker process, from its start to its end."""

    def __init__(self, supervisor: Supervisor, parts: Sequence[Part]) -> None:
        self._supervisor, self._left = supervisor, list(parts)
        self._running: Part | None = None
        self._began = time.monotonic()

    def run(self) -> list[Part]:
        """Runs the parts until the worker ends, or is stuck, or the time is over. Returns the parts that are left."""
        reading, writing = os.pipe()
        names = ",".join(part.name for part in self._left)
        end = self._supervisor.end - RESERVE
        command = [*self._supervisor.worker, "--parts", names, "--end", str(end), "--pipe", str(writing)]
        with (self._supervisor.out / LOG).open("a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, pass_fds=(writing,), start_new_session=True)
        os.close(writing)
        messages: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(reading, messages), daemon=True).start()
        try:
            self._follow(messages, end)
            code = _exit_code(process)
        finally:
            with suppress(ProcessLookupError):  # its own children too; not waited for: a driver may never let go
                os.killpg(process.pid, signal.SIGKILL)
        self._explain(code)
        return self._left

    def _follow(self, messages: "queue.Queue[str | None]", end: float) -> None:
        """Until the worker has ended, or its deadline has passed."""
        while True:
            limit = self._running.seconds if self._running else START_SECONDS
            deadline = min(self._began + limit + GRACE, end + RESERVE / 2)
            try:
                message = messages.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return
            if message is None:
                return
            self._take(*json.loads(message))

    def _take(self, kind: str, *content: object) -> None:
        if kind == "row":
            *row, seconds = content
            self._supervisor.add(Row(*row), float(seconds))  # type: ignore[arg-type]
        elif kind == "table":
            self._supervisor.write(TABLES, str(content[0]))
        else:
            self._began = time.monotonic()
            part = next(part for part in self._left if part.name == content[0])
            self._running = part if kind == "begin" else None
            if kind != "begin":
                self._left.remove(part)
            if kind == "skipped":
                self._supervisor.skip(part)

    def _explain(self, code: int | None) -> None:
        """A failed row for the part in which the worker ended."""
        took, part = time.monotonic() - self._began, self._running
        if part is None:
            if code not in (0, None) and len(self._left) and code != 3:
                self._supervisor.add(failed("worker", f"ended with code {code} between parts; see {LOG}"), took)
            return
        self._left.remove(part)
        over = time.monotonic() >= self._supervisor.end - RESERVE - 0.5
        if over and not part.required:
            self._supervisor.not_run.append(f"{part.name} (cut off)")
            return
        reason = f"ended with code {code}"
        if over:
            reason = "the time was over"
        elif took >= part.seconds - 0.5:
            reason = f"took more than its {part.seconds:g} s"
        self._supervisor.add(failed(part.name, f"{reason}; the stacks are in {LOG}"), took)


def _read(pipe: int, messages: "queue.Queue[str | None]") -> None:
    """Puts each line of a pipe into a queue, and None at its end."""
    with os.fdopen(pipe) as file:
        for line in file:
            messages.put(line)
    messages.put(None)


def _exit_code(process: "subprocess.Popen[bytes]") -> int | None:
    """The exit code of a process that is about to end; None if it does not."""
    with suppress(subprocess.TimeoutExpired):
        return process.wait(0.5)
    return None


def worker_command() -> list[str]:
    """Starts this package as a worker."""
    return [sys.executable, "-m", "tests.benchmarks.accelerator"]
