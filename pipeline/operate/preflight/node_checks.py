"""The health checks of one node: its accelerators, the shard set, the run's disk, and the network between the nodes."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_prep.shards.format import record_crc32
from data_prep.shards.reader import ShardSet, open_shard_set
from pipeline.operate.preflight.all_reduce import ACCELERATORS_OK, AllReduceCheck
from pipeline.operate.preflight.report import Report

RECORDS = 8
"""Records of each split that are read and compared with their checksums."""
SMI_QUERY = ("nvidia-smi", "--query-gpu=index,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader")


def check_node(node: str, nodes: list[str], run: Path, shards: str | None, accelerators: int, seconds: float) -> Report:
    """Checks this node, one of `nodes`, which all run the same checks at the same time.

    seconds: time limit of the all-reduce between all nodes. If that fails, each node repeats it with one neighbor of
    the ring after the other, in half that time each; the results show which node is faulty.
    """
    began, report = time.monotonic(), Report(node)
    port, position, count = int(os.environ.get("MASTER_PORT", 29500)) + 1, nodes.index(node), len(nodes)
    lines: list[str] = []
    if count > 1 or accelerators:
        check = AllReduceCheck(nodes[0], port, position, count, accelerators, seconds)
        report.all_reduce_ok, lines = check.run()
    if accelerators:
        _record_fault(report, "accelerators", lambda: _check_accelerators(lines, seconds))
    _record_fault(report, "run", lambda: _check_run(report, run))
    if shards is not None:
        _record_fault(report, "shards", lambda: _check_shards(report, shards))
    if not report.all_reduce_ok and "accelerators" not in report.faults:
        for number, other, pair in pair_checks(nodes, node, port, accelerators, seconds / 2):
            start = began + seconds + (number - 1) * pair.seconds
            time.sleep(max(0.0, start - time.monotonic()))
            report.pairs_ok[other], _ = pair.run()
    report.seconds = time.monotonic() - began
    return report


def pair_checks(
    nodes: list[str], node: str, port: int, accelerators: int, seconds: float
) -> list[tuple[int, str, AllReduceCheck]]:
    """A node's all-reduces with each neighbor of the ring: (round, counted from 1, the neighbor's name, the check).

    A node has at most one in a round. Of two nodes there are none: the all-reduce between all was theirs already.
    """
    count, position = len(nodes), nodes.index(node)
    found = []
    for first in range(count) if count > 2 else ():
        second = (first + 1) % count
        if position in (first, second):
            number = 3 if first == count - 1 and count % 2 else 1 + first % 2
            rank = int(position == second)
            check = AllReduceCheck(nodes[first], port + number, rank, 2, accelerators, seconds)
            found.append((number, nodes[second] if rank == 0 else nodes[first], check))
    return sorted(found, key=lambda entry: entry[0])


def _record_fault(report: Report, kind: str, check: Callable[[], None]) -> None:
    try:
        check()
    except (ValueError, OSError, subprocess.SubprocessError) as error:
        report.faults[kind] = " ".join(str(error).split())


def _check_accelerators(lines: list[str], seconds: float) -> None:
    """lines: printed by the all-reduce's process. Raises ValueError with its sentence, or with memory errors."""
    if ACCELERATORS_OK not in lines:
        raise ValueError(lines[-1] if lines else f"the accelerators do not answer within {seconds:g} s")
    if shutil.which(SMI_QUERY[0]) is None:
        return
    counted = subprocess.run(SMI_QUERY, capture_output=True, text=True, timeout=seconds, check=True).stdout
    for index, errors in (line.split(", ", 1) for line in counted.splitlines() if ", " in line):
        if errors.strip().isdecimal() and int(errors) > 0:
            raise ValueError(f"accelerator {index} has {errors} uncorrected memory errors")


def _check_run(report: Report, run: Path) -> None:
    if not run.is_dir():
        raise ValueError(f"{run} does not exist; a run must be on a file system that all nodes share")
    probe = run / f".preflight-{report.node}"
    try:
        with probe.open("wb") as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
    finally:
        probe.unlink(missing_ok=True)
    report.free_bytes = shutil.disk_usage(run).free


def _check_shards(report: Report, path: str) -> None:
    """Opens the set, which checks that each file exists and has its size, and reads records of a local one."""
    shards = open_shard_set(path)
    report.digest = shards.digest
    if shards.address is None:
        for name in ("train", "valid"):
            _check_records(shards, name)


def _check_records(shards: ShardSet, name: str) -> None:
    split = shards.split(name)
    expected = [crc32 for shard in split.shards for crc32 in shard["record_crc32"]]
    for index in np.unique(np.linspace(0, len(expected) - 1, min(RECORDS, len(expected))).astype(int)):
        if record_crc32(*split.record(int(index))) != expected[index]:
            shard = int(np.searchsorted(split.shard_starts, index, side="right")) - 1
            raise ValueError(f"{split.file(split.shards[shard])} does not match its checksums; it was damaged.")
