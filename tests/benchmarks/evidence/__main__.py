"""python -m tests.benchmarks.evidence: small models on CIFAR-10, and which findings of the paper they repeat.

An interrupted command resumes; a larger --images continues the runs. `make evidence` starts it.
"""

import argparse
import sys
from pathlib import Path

from tests.benchmarks.evidence.findings import write_findings
from tests.benchmarks.evidence.jobs import Places, all_jobs, lengths
from tests.benchmarks.evidence.workers import Workers


def main() -> int:
    """Runs the jobs that are not finished, then writes the findings of all that are."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.evidence", description=__doc__)
    parser.add_argument("--shards", type=Path, required=True, help="A labelled shard set of CIFAR-10 at 16x16.")
    parser.add_argument("--out", type=Path, required=True, help="Folder of runs, results and findings.")
    parser.add_argument("--images", type=int, default=64_000, help="Training images of the longest finished models.")
    parser.add_argument("--jobs", type=int, default=2, help="Processes at a time, each with one thread.")
    options = parser.parse_args()
    try:
        ends = lengths(options.images)
    except ValueError as error:
        parser.error(str(error))
    places = Places(options.shards, options.out)
    workers = Workers(options.out, options.jobs)
    jobs = all_jobs(places, options.images)
    code = workers.run(jobs)
    write_findings(places, ends, sum(workers.record(job)["cpu_seconds"] for job in jobs))
    return code


if __name__ == "__main__":
    sys.exit(main())
