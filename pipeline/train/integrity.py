"""Shards are read whole once and compared with their digests, so that damage is found before it is learned from."""

from pathlib import Path

from data_prep.files import file_sha256
from data_prep.shards import ShardSet
from pipeline.train.ranks import Ranks, failing_together, from_first
from pipeline.train.run_folder import RunFolder

VERIFIED = "verified_shards"


def verify_shards(shards: ShardSet, folder: RunFolder, ranks: Ranks) -> None:
    """Compares every shard of train and valid with its sha256; the ranks share the reading.

    A file that an earlier start of the run verified, and whose size and time are the same, is not read again.
    The shard set
    must be the same files on every node. Raises ValueError on every rank, naming the file.
    """
    promised = {
        shard["file"]: shard["sha256"]
        for name in ("train", "valid")
        for shard in shards.manifest["splits"][name]["shards"]
    }
    todo: list[str] = []
    with failing_together():
        if ranks.is_first:
            known = folder.recall(VERIFIED) or {}
            todo = [name for name in sorted(promised) if known.get(name) != _signature(shards.path / name)]
    todo = from_first(todo)
    with failing_together():
        for name in todo[ranks.rank :: ranks.count]:
            if file_sha256(shards.path / name) != promised[name]:
                raise ValueError(
                    f"{shards.path / name} is not what was written (its sha256 differs from shards.json); delete "
                    f"the shard set and prepare it again."
                )
    with failing_together():
        if ranks.is_first:
            folder.note("running", **{VERIFIED: {name: _signature(shards.path / name) for name in promised}})


def _signature(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
