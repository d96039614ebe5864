"""Runs jobs as processes, several at a time, and records which are finished and what they cost.

OUT/done/<job>.json has `words`, `finished`, and `cpu_seconds` of all attempts. A finished job is not repeated unless
its words changed; an interrupted one runs again, and its command resumes.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.common.files import read_json, write_json
from tests.benchmarks.evidence.jobs import Job

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Workers:
    """At most `count` processes at a time, each with one thread."""

    def __init__(self, out: Path, count: int) -> None:
        """Logs go to OUT/logs, records to OUT/done."""
        self.records, self.logs, self.count = out / "done", out / "logs", count
        self.running: dict[int, Job] = {}
        self.stopped = False
        self.failed: list[str] = []
        for folder in (self.records, self.logs):
            folder.mkdir(parents=True, exist_ok=True)

    def run(self, jobs: Sequence[Job]) -> int:
        """Runs what is not finished: 0, all are finished; 1, one failed; 75, stopped on request."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._stop)
        waiting = [job for job in jobs if not self.is_finished(job)]
        names = {job.name for job in waiting}
        print(f"{len(jobs) - len(waiting)} of {len(jobs)} jobs are finished; logs are in {self.logs}", flush=True)
        while (waiting and not self.stopped and not self.failed) or self.running:
            ready = [job for job in waiting if not names & set(job.needs)]
            if ready and len(self.running) < self.count and not self.stopped and not self.failed:
                waiting.remove(ready[0])
                self._start(ready[0])
                continue
            assert self.running, f"no job can start: {sorted(names)} wait for each other"
            self._wait(names)
        if self.stopped:
            print("stopped; the same command continues", flush=True)
            return os.EX_TEMPFAIL
        return 1 if self.failed else os.EX_OK

    def is_finished(self, job: Job) -> bool:
        """Whether the job was run to its end with these words."""
        record = self.record(job)
        return record["finished"] and record["words"] == list(job.words)

    def record(self, job: Job) -> dict[str, Any]:
        """What is known of a job."""
        path = self.records / f"{job.name}.json"
        return read_json(path) if path.exists() else {"words": [], "finished": False, "cpu_seconds": 0.0}

    def _start(self, job: Job) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        with (self.logs / f"{job.name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "pipeline", *job.words], stdout=log, stderr=log, env=environment
            )
        self.running[process.pid] = job
        print(f"{time.strftime('%H:%M:%S')} started  {job.name}", flush=True)

    def _wait(self, names: set[str]) -> None:
        """Waits for one process, records it, and removes it from `names` if it finished."""
        process, status, usage = os.wait3(0)
        job = self.running.pop(process)
        code, seconds = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        cost = self.record(job)["cpu_seconds"] + seconds
        record = {"words": list(job.words), "finished": code == os.EX_OK, "cpu_seconds": cost}
        write_json(self.records / f"{job.name}.json", record)
        if code == os.EX_OK:
            names.remove(job.name)
            print(f"{time.strftime('%H:%M:%S')} finished {job.name}, {cost / 60:.1f} CPU-minutes", flush=True)
        elif not self.stopped:
            self.failed.append(job.name)
            print(f"error: {job.name} ended with code {code}; see {self.logs / f'{job.name}.log'}", file=sys.stderr)

    def _stop(self, number: int, frame: object) -> None:
        """Asks the running commands to save and end."""
        self.stopped = True
        for process in self.running:
            os.kill(process, signal.SIGTERM)
