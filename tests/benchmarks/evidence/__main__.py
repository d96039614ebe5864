"""python -m tests.benchmarks.evidence: small models on CIFAR-10, and what the paper's findings come to with them.

An interrupted command resumes; a larger --images continues the runs. `make evidence` starts it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.evidence.findings import write_findings
from tests.benchmarks.evidence.jobs import Job, Places, all_jobs, lengths, trained_steps
from tests.benchmarks.evidence.workers import Workers


def main() -> int:
    """Runs the jobs that are not finished, then writes the findings of all that are."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.evidence", description=__doc__)
    parser.add_argument("--shards", type=Path, required=True, help="A labelled shard set of CIFAR-10 at 16x16.")
    parser.add_argument("--out", type=Path, required=True, help="Folder of runs, results and findings.")
    parser.add_argument("--images", type=int, default=64_000, help="Training images of the longest finished models.")
    parser.add_argument("--jobs", type=int, default=2, help="Processes at a time, each with one thread.")
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error(f"--jobs is {options.jobs}; it must be at least 1.")
    places = Places(options.shards, options.out)
    try:
        counts = lengths(options.images)
        jobs = all_jobs(places, options.images)
        workers = Workers(options.out, options.jobs)
        _require_no_fewer(workers, jobs)
        code = workers.run(jobs)
    except ValueError as error:
        parser.error(str(error))
    write_findings(places, counts, sum(workers.record(job)["cpu_seconds"] for job in jobs))
    return code


def _require_no_fewer(workers: Workers, jobs: Sequence[Job]) -> None:
    """Raises ValueError if a run was already trained for more images: a run is not shortened."""
    for job in jobs:
        before, now = (trained_steps(arguments) for arguments in (workers.record(job)["arguments"], job.arguments))
        if job.name.endswith("-trunk") and before > now:
            raise ValueError(f"--images asks for {now} steps of {job.name}, which was started for {before}; name more.")


if __name__ == "__main__":
    sys.exit(main())
