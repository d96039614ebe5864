"""python -m tests.benchmarks [PART ...]: measures beside the libraries that a user would pick, on a CPU.

Each part is a process of its own; its page, results and the summary are written to out/bench/ (see record.py).
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tests.benchmarks import record
from tests.benchmarks.marks import Growth, Result

Measure = Callable[[Path], Iterator[str | Result | Growth]]
"""Of a part: from an empty folder to the lines of its page."""
PARTS = {  # module and function; only the module of a part that is measured is imported
    "reading": "data_peers.reading",
    "resuming": "data_peers.resuming",
    "mixtures": "data_peers.mixtures",
    "preparing": "data_peers.preparing",
    "training": "training_peers.table",
    "saves": "saving_peers.table",
    "starts": "start_peers.table",
    "completions": "completion_peers.table",
    "classifiers": "feature_peers.table",
    "growth": "growth.table",
    "representation": "representation.table",
    "memory": "memory.table",
    "scale": "scale.table",
}
ONLY_BY_NAME = {"representation", "memory", "scale"}
"""`representation` takes more than an hour; the others compare `pipeline plan` with runs."""


def main(wanted: list[str]) -> None:
    """Measures the parts one after the other, then prints the summary; a part that fails does not end the others."""
    unknown = sorted(set(wanted) - PARTS.keys())
    if unknown:
        sys.exit(f"error: {unknown[0]!r} is not a part; the parts are {' '.join(PARTS)}.")
    if len(wanted) == 1:
        run_part(wanted[0])
        return
    failed = []
    for name in wanted or [part for part in PARTS if part not in ONLY_BY_NAME]:
        print(f"\n## {name}\n", flush=True)
        if subprocess.run([sys.executable, "-m", "tests.benchmarks", name]).returncode:
            failed.append(name)
    print(f"\n{record.write_summary(list(PARTS))}", flush=True)
    if failed:
        sys.exit(f"error: these parts failed: {', '.join(failed)}.")


def run_part(name: str) -> None:
    """Measures one part, prints it as it comes, and writes it and the summary."""
    torch.set_num_threads(1)
    module, function = PARTS[name].split(".")
    measure: Measure = getattr(import_module(f"tests.benchmarks.{module}"), function)
    with TemporaryDirectory() as folder:
        record.write_part(name, measure(Path(folder)), lambda line: print(line, flush=True))
    record.write_summary(list(PARTS))


if __name__ == "__main__":
    main(sys.argv[1:])
