"""Runs jobs as processes, several at a time, and records which are finished and what they cost.

OUT/done/<job>.json has `arguments`, `inputs` (a digest of the recipe and the shard set), `finished`, and `cpu_seconds`
of all attempts. A finished job is not repeated unless its arguments changed; an interrupted one runs again, and its
command resumes.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from data_prep.common.files import read_json, write_json
from pipeline.stop_signals import handle_stop_signals
from tests.benchmarks.evidence.jobs import Job

PIPELINE = (sys.executable, "-m", "pipeline")
POLL_SECONDS = 0.2


class Workers:
    """At most `count` processes at a time, each with one thread."""

    def __init__(self, out: Path, count: int, command: Sequence[str] = PIPELINE) -> None:
        """Logs go to OUT/logs, records to OUT/done. command: what the arguments of a job are given to."""
        self.records, self.logs, self.count, self.command = out / "done", out / "logs", count, command
        self.running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}
        self.stopped = False
        self.failed = False
        for folder in (self.records, self.logs):
            folder.mkdir(parents=True, exist_ok=True)

    def run(self, jobs: Sequence[Job]) -> int:
        """Runs what is not finished: 0, all are finished; 1, one failed; 75, stopped on request.

        Raises ValueError, before it starts any, if one was run with another recipe or shard set.
        """
        for job in jobs:
            self._check_inputs(job)
        former = handle_stop_signals(self._stop)
        try:
            return self._run([job for job in jobs if not self.is_finished(job)], len(jobs))
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _run(self, waiting: list[Job], count: int) -> int:
        open_jobs = {job.name for job in waiting}
        print(f"{count - len(waiting)} of {count} jobs are finished; logs are in {self.logs}", flush=True)
        while self.running or (waiting and not self.stopped and not self.failed):
            ready = [job for job in waiting if not open_jobs & set(job.needs)]
            if ready and len(self.running) < self.count and not self.stopped and not self.failed:
                waiting.remove(ready[0])
                self._start(ready[0])
                continue
            assert self.running, f"no job can start: {sorted(open_jobs)} wait for each other"
            open_jobs -= self._finished()
        if self.stopped:
            print(f"stopped; the same command continues; {len(open_jobs)} of {count} jobs are left", flush=True)
            return os.EX_TEMPFAIL
        return 1 if self.failed else os.EX_OK

    def is_finished(self, job: Job) -> bool:
        """Whether the job was run to its end with these arguments."""
        record = self.record(job)
        return record["finished"] and record["arguments"] == list(job.arguments)

    def record(self, job: Job) -> dict[str, Any]:
        """What is known of a job."""
        path = self.records / f"{job.name}.json"
        return read_json(path) if path.exists() else {"arguments": [], "finished": False, "cpu_seconds": 0.0}

    def _check_inputs(self, job: Job) -> None:
        if self.record(job).get("inputs", inputs := _inputs(job)) != inputs:
            raise ValueError(
                f"{job.name} was run with another recipe or shard set than {' and '.join(map(str, job.inputs))}; "
                f"restore them, or name another folder for --out."
            )

    def _start(self, job: Job) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        with (self.logs / f"{job.name}.log").open("ab") as log:
            process = subprocess.Popen([*self.command, *job.arguments], stdout=log, stderr=log, env=environment)
        self.running[process.pid] = (job, process)
        self._write(job, 0.0, finished=False)
        print(f"{time.strftime('%H:%M:%S')} started  {job.name}", flush=True)
        if self.stopped:  # the signal came before the process was known
            _terminate(process.pid)

    def _finished(self) -> set[str]:
        """Waits until processes end, and records them: the names of the jobs that finished."""
        names: set[str] = set()
        count = len(self.running)
        while len(self.running) == count:
            time.sleep(POLL_SECONDS)
            for number in list(self.running):
                ended, status, usage = os.wait4(number, os.WNOHANG)
                if ended:
                    job, process = self.running.pop(number)
                    process.returncode = os.waitstatus_to_exitcode(status)  # it must not be waited for again
                    self._write(job, usage.ru_utime + usage.ru_stime, finished=process.returncode == os.EX_OK)
                    names |= self._report(job, process.returncode)
        return names

    def _report(self, job: Job, code: int) -> set[str]:
        if code == os.EX_OK:
            cost = self.record(job)["cpu_seconds"]
            print(f"{time.strftime('%H:%M:%S')} finished {job.name}, {cost / 60:.1f} CPU-minutes", flush=True)
            return {job.name}
        if not self.stopped:
            self.failed = True
            log = self.logs / f"{job.name}.log"
            last = log.read_text(errors="replace").strip().rpartition("\n")[2]
            print(f"error: {job.name} ended with code {code}; see {log}: {last}", file=sys.stderr, flush=True)
        return set()

    def _write(self, job: Job, seconds: float, finished: bool) -> None:
        record = {"arguments": list(job.arguments), "inputs": _inputs(job), "finished": finished}
        cost = {"cpu_seconds": self.record(job)["cpu_seconds"] + seconds}
        write_json(self.records / f"{job.name}.json", record | cost)

    def _stop(self, number: int, frame: object) -> None:
        """Asks the running commands to save and end."""
        self.stopped = True
        for process in list(self.running):
            _terminate(process)


def _terminate(process: int) -> None:
    with suppress(ProcessLookupError):  # it has just ended
        os.kill(process, signal.SIGTERM)


def _inputs(job: Job) -> str:
    """A digest of the contents; comments in recipes may change."""
    contents = [yaml.safe_load(path.read_text()) if path.is_file() else None for path in job.inputs]
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
