"""Prints a line for each check, then what was measured. Exit code 1 if a check failed."""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from tests.benchmarks.accelerator.parts import CHECKS, PARTS, SPEED
from tests.benchmarks.accelerator.supervisor import Supervisor, worker_command

SECONDS = 180.0
TOY_SHORTER = 5.0
"""By how much shorter a measurement is at toy size."""
OUT = Path("out/accelerator")
HAS_CUDA = "import ctypes, sys; sys.exit(ctypes.CDLL('libcuda.so.1').cuInit(0))"
"""A process of its own: a driver may hang. Importing torch would take seconds."""
DRIVER_SECONDS = 60.0
"""A driver that takes longer to start hangs."""


def has_cuda() -> bool:
    """Whether the driver of an NVIDIA device starts."""
    try:
        done = subprocess.run([sys.executable, "-c", HAS_CUDA], stderr=subprocess.DEVNULL, timeout=DRIVER_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def main() -> int:
    """Returns 0 if every check is ok, 1 if one failed, 2 without an accelerator."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.accelerator")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="Ends itself after this many; default 180.")
    parser.add_argument("--out", type=Path, default=OUT, help="Folder of the results; default out/accelerator.")
    parser.add_argument("--toy", action="store_true", help="Toy sizes, on whatever device there is.")
    parser.add_argument("--only", choices=("checks", "speed"), help="Run these parts only.")
    parser.add_argument("--parts", help="Run these parts only; names separated by commas.")
    parser.add_argument("--end", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--pipe", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    parts = {"checks": CHECKS, "speed": SPEED}.get(options.only, PARTS)
    if options.parts:
        names = options.parts.split(",")
        unknown = sorted(set(names) - {part.name for part in PARTS})
        if unknown:
            parser.error(f"--parts names {', '.join(unknown)}; the parts are {', '.join(p.name for p in PARTS)}.")
        parts = tuple(part for part in PARTS if part.name in names)
    if options.toy:
        os.environ["BENCHMARK_TOY"] = "1"  # for the worker
    if os.environ.get("BENCHMARK_TOY") == "1":
        parts = tuple(replace(part, needs=part.needs / TOY_SHORTER) for part in parts)
    if options.pipe is not None:
        from tests.benchmarks.accelerator.worker import main as run_worker

        run_worker(parts, options.end, options.pipe)
    if not options.toy and not has_cuda():
        print("error: this machine has no CUDA device; --toy tries the script on a CPU.", file=sys.stderr)
        return 2
    os.environ["BENCHMARK_OUT"] = str(options.out)
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    return 0 if Supervisor(parts, worker_command(), options.out, began + options.seconds).run() else 1


if __name__ == "__main__":
    sys.exit(main())
