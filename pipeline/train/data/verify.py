"""Compares every shard with its digest before the first step, so that a run never trains on damaged data."""

from pathlib import Path

from data_prep.common.files import file_sha256
from data_prep.shards.reader import ShardSet, Split
from pipeline.checkpoint.run_folder import RunFolder
from pipeline.distributed import Ranks, from_first, raise_on_all_ranks

VERIFIED = "verified_shards"


def verify_shards(shards: ShardSet, folder: RunFolder, ranks: Ranks) -> None:
    """Compares every shard of train and valid with its sha256; each rank verifies a share of the files.

    A file that an earlier start of the run verified, and whose size and modification time are unchanged, is not read
    again. The shard set must be the same files on every node. Of a remote set, valid is copied to the cache and
    verified there; train is verified record by record as it is streamed. Raises ValueError on every rank, naming the
    file.
    """
    if shards.address is not None:
        fetch_valid(shards.split("valid"), ranks)
        return
    folder_path = Path(shards.path)
    expected = {
        shard["file"]: shard["sha256"]
        for name in ("train", "valid")
        for shard in shards.manifest["splits"][name]["shards"]
    }

    def unverified() -> list[str]:
        known = folder.recall(VERIFIED) or {}
        return [name for name in sorted(expected) if known.get(name) != _signature(folder_path / name)]

    todo = from_first(unverified)
    with raise_on_all_ranks():
        for name in todo[ranks.rank :: ranks.count]:
            if file_sha256(folder_path / name) != expected[name]:
                raise ValueError(
                    f"{folder_path / name} is damaged (its sha256 differs from shards.json); restore it from a copy, "
                    f"or delete the shard set and prepare it again."
                )
    with raise_on_all_ranks():
        if ranks.is_first:
            folder.note("running", **{VERIFIED: {name: _signature(folder_path / name) for name in expected}})


def fetch_valid(split: Split, ranks: Ranks) -> None:
    """Copies the shards of a remote split into the cache. Raises ValueError or OSError on every rank.

    All ranks copy a share each. If nodes do not share the cache, each node's first rank then copies what is missing.
    """
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
