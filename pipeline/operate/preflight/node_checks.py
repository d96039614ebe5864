"""The health checks of one node: its accelerators, the shard set, the run's disk, and the network between the nodes."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_prep.common.files import json_digest
from data_prep.shards.format import record_crc32
from data_prep.shards.reader import ShardSet, open_shard_set
from pipeline.operate.preflight.all_reduce import AllReduceCheck
from pipeline.operate.preflight.report import Report

RECORDS = 8
"""Records of each split that are read and compared with their checksums."""


def check_node(
    node: str, nodes: list[str], run: Path, shards: list[str], accelerators: int, seconds: float, checkpoints: Path
) -> Report:
    """Checks this node, one of `nodes`, which all run the same checks at the same time.

    checkpoints: their folder, whose disk needs space. seconds: time limit of the all-reduce between all nodes. If that
    fails, each node repeats it with one neighbor of the ring after the other, in half that time each; the results show
    which node is faulty.
    """
    began, report = time.monotonic(), Report(node)
    port, position, count = int(os.environ.get("MASTER_PORT", 29500)) + 1, nodes.index(node), len(nodes)
    if count > 1 or accelerators:
        outcome = AllReduceCheck(nodes[0], port, position, count, accelerators, seconds).run()
        report.all_reduce_ok = outcome.succeeded
        if outcome.accelerator_fault:
            report.faults["accelerators"] = outcome.accelerator_fault
        elif count == 1 and not outcome.succeeded:
            reason = outcome.message or f"it took more than {seconds:g} s"
            report.faults["accelerators"] = f"the all-reduce between its accelerators failed: {reason}"
    _record_fault(report, "run", lambda: _check_run(report, run, checkpoints))
    if shards:
        _record_fault(report, "shards", lambda: _check_shards(report, shards))
    if not report.all_reduce_ok and "accelerators" not in report.faults:
        for number, other, pair in pair_checks(nodes, node, port, accelerators, seconds / 2):
            start = began + seconds + (number - 1) * pair.seconds
            time.sleep(max(0.0, start - time.monotonic()))
            report.pairs_ok[other] = pair.run().succeeded
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
    except (ValueError, OSError) as error:
        report.faults[kind] = " ".join(str(error).split())


def _check_run(report: Report, run: Path, checkpoints: Path) -> None:
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
    existing = next(folder for folder in (checkpoints, *checkpoints.absolute().parents) if folder.exists())
    report.free_bytes = shutil.disk_usage(existing).free


def _check_shards(report: Report, paths: list[str]) -> None:
    """Opens the sets, which checks that each file exists and has its size, and reads records of local ones."""
    sets = [open_shard_set(path) for path in paths]
    digests = [shards.digest for shards in sets]
    report.digest = digests[0] if len(digests) == 1 else json_digest(digests)
    for shards in sets:
        for name in ("train", "valid") if shards.address is None else ():
            _check_records(shards, name)


def _check_records(shards: ShardSet, name: str) -> None:
    split = shards.split(name)
    expected = [crc32 for shard in split.shards for crc32 in shard["record_crc32"]]
    for index in np.unique(np.linspace(0, len(expected) - 1, min(RECORDS, len(expected))).astype(int)):
        if record_crc32(*split.record(int(index))) != expected[index]:
            shard = int(np.searchsorted(split.shard_starts, index, side="right")) - 1
            raise ValueError(f"{split.file(split.shards[shard])} does not match its checksums; it was damaged.")
