"""Shards are read whole once and compared with their digests, so that damage is found before it is learned from."""

from pathlib import Path

from data_prep.common.files import file_sha256
from data_prep.shards.reader import ShardSet, Split
from pipeline.checkpoint.run_folder import RunFolder
from pipeline.distributed import Ranks, from_first, raise_on_all_ranks

VERIFIED = "verified_shards"


def verify_shards(shards: ShardSet, folder: RunFolder, ranks: Ranks) -> None:
    """Compares every shard of train and valid with its sha256; the ranks share the reading.

    A file that an earlier start of the run verified, and whose size and time are the same, is not read again.
    The shard set must be the same files on every node. Of a remote set, valid is copied to where every node finds
    it, and checked by that; train is checked record by record as it is streamed. Raises ValueError on every rank,
    naming the file.
    """
    if shards.address is not None:
        fetch_valid(shards.split("valid"), ranks)
        return
    place = Path(shards.path)
    promised = {
        shard["file"]: shard["sha256"]
        for name in ("train", "valid")
        for shard in shards.manifest["splits"][name]["shards"]
    }

    def unverified() -> list[str]:
        known = folder.recall(VERIFIED) or {}
        return [name for name in sorted(promised) if known.get(name) != _signature(place / name)]

    todo = from_first(unverified)
    with raise_on_all_ranks():
        for name in todo[ranks.rank :: ranks.count]:
            if file_sha256(place / name) != promised[name]:
                raise ValueError(
                    f"{place / name} is not what was written (its sha256 differs from shards.json); delete "
                    f"the shard set and prepare it again."
                )
    with raise_on_all_ranks():
        if ranks.is_first:
            folder.note("running", **{VERIFIED: {name: _signature(place / name) for name in promised}})


def fetch_valid(split: Split, ranks: Ranks) -> None:
    """Copies the shards of a remote split into the cache: shared between all ranks, where nodes share the cache, and
    what is still missing then by each node's first rank. Raises ValueError or OSError on every rank."""
    with raise_on_all_ranks():
        for shard in split.shards[ranks.rank :: ranks.count]:
            split.file(shard)
    with raise_on_all_ranks():
        if ranks.local_rank == 0:
            for shard in split.shards:
                split.file(shard)


def _signature(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
