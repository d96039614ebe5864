"""What is looked at on each node: its accelerators, the shard set, the run's disk, and whether the nodes answer."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_prep.shards.format import record_crc32
from data_prep.shards.reader import ShardSet, open_shard_set
from pipeline.operate.preflight.allreduce import LOOKED, Meeting
from pipeline.operate.preflight.report import Report

RECORDS = 8
"""Of each split that are read and compared with their checksums."""
SMI_QUERY = ("nvidia-smi", "--query-gpu=index,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader")


def look(node: str, nodes: list[str], run: Path, shards: str | None, accelerators: int, seconds: float) -> Report:
    """Looks at this node, one of `nodes`, which all do the same at once.

    seconds: for the all-reduce between all. Where that fails, each node meets its neighbours in a ring one by one, in
    half that time each, which tells whose fault it is.
    """
    began, report = time.monotonic(), Report(node)
    port, place, count = int(os.environ.get("MASTER_PORT", 29500)) + 1, nodes.index(node), len(nodes)
    meeting = Meeting(nodes[0], port, place, count, accelerators, seconds)
    lines: list[str] = []
    if count > 1 or accelerators:
        report.met_all, lines = meeting.hold()
    if accelerators:
        _note(report, "accelerators", lambda: _check_accelerators(lines, seconds))
    _note(report, "run", lambda: _check_run(report, run))
    if shards is not None:
        _note(report, "shards", lambda: _check_shards(report, shards))
    if not report.met_all and "accelerators" not in report.faults:
        for number, other, pair in pairs(nodes, node, port, accelerators, seconds / 2):
            begin = began + seconds + (number - 1) * pair.seconds
            time.sleep(max(0.0, begin - time.monotonic()))
            report.met[other], _ = pair.hold()
    report.seconds = time.monotonic() - began
    return report


def pairs(nodes: list[str], node: str, port: int, accelerators: int, seconds: float) -> list[tuple[int, str, Meeting]]:
    """The meetings of a node with its neighbours in the ring: (round from 1 on, the other's name, the meeting).

    No node is in two meetings of one round. Two nodes have met in the meeting of all.
    """
    count, place = len(nodes), nodes.index(node)
    found = []
    for first in range(count) if count > 2 else ():
        second = (first + 1) % count
        if place in (first, second):
            number = 3 if first == count - 1 and count % 2 else 1 + first % 2
            rank = int(place == second)
            meeting = Meeting(nodes[first], port + number, rank, 2, accelerators, seconds)
            found.append((number, nodes[second] if rank == 0 else nodes[first], meeting))
    return sorted(found, key=lambda entry: entry[0])


def _note(report: Report, kind: str, check: Callable[[], None]) -> None:
    try:
        check()
    except (ValueError, OSError, subprocess.SubprocessError) as error:
        report.faults[kind] = " ".join(str(error).split())


def _check_accelerators(lines: list[str], seconds: float) -> None:
    """Raises ValueError with what the meeting's process found, or what the driver counts."""
    if LOOKED not in lines:
        raise ValueError(lines[-1] if lines else f"the accelerators do not answer within {seconds:g} s")
    if shutil.which(SMI_QUERY[0]) is None:
        return
    counted = subprocess.run(SMI_QUERY, capture_output=True, text=True, timeout=seconds, check=True).stdout
    for index, errors in (line.split(", ", 1) for line in counted.splitlines() if ", " in line):
        if errors.strip().isdecimal() and int(errors) > 0:
            raise ValueError(f"accelerator {index} has counted {errors} memory errors that were not corrected")


def _check_run(report: Report, run: Path) -> None:
    if not run.is_dir():
        raise ValueError(f"{run} is not there; a run must lie where all nodes see it")
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
    """Opens the set, which looks at each file's presence and size, and reads records of a local one."""
    shards = open_shard_set(path)
    report.digest = shards.digest
    if shards.address is None:
        for name in ("train", "valid"):
            _read_some(shards, name)


def _read_some(shards: ShardSet, name: str) -> None:
    split = shards.split(name)
    promised = [crc32 for shard in split.shards for crc32 in shard["record_crc32"]]
    for index in np.unique(np.linspace(0, len(promised) - 1, min(RECORDS, len(promised))).astype(int)):
        if record_crc32(*split.record(int(index))) != promised[index]:
            shard = int(np.searchsorted(split.shard_starts, index, side="right")) - 1
            raise ValueError(f"{split.file(split.shards[shard])} does not hold what was written; it was damaged.")
