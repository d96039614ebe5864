"""Compares every shard with its digest before the first step, so that a run never trains on damaged data."""

from pathlib import Path

from data_prep.common.files import file_sha256
from data_prep.shards.reader import Split
from pipeline.checkpoint.run_folder import RunFolder
from pipeline.distributed import Ranks, from_first, raise_on_all_ranks
from pipeline.training_set import TrainingSets

VERIFIED = "verified_shards"


def verify_shards(sets: TrainingSets, folder: RunFolder, ranks: Ranks) -> None:
    """Compares every shard of train and valid with its sha256; each rank verifies a share of the files.

    A file that an earlier start of the run verified, and whose size and modification time are unchanged, is not read
    again. The shard sets must be the same files on every node. Of a remote set, valid is copied to the cache and
    verified there; train is verified record by record as it is streamed. Raises ValueError on every rank, naming the
    file.
    """
    expected = {}
    for one in sets.sets:
        if one.shards.address is not None:
            fetch_valid(one.shards.split("valid"), ranks)
            continue
        for name in ("train", "valid"):
            for shard in one.shards.manifest["splits"][name]["shards"]:
                # a set of data.shards is recorded by the names of its files, as in earlier versions
                key = f"{one.shards.digest}/{shard['file']}" if sets.is_mixture else shard["file"]
                expected[key] = (Path(one.shards.path) / shard["file"], shard["sha256"])

    def unverified() -> list[str]:
        known = folder.recall(VERIFIED) or {}
        return [key for key in sorted(expected) if known.get(key) != _signature(expected[key][0])]

    todo = from_first(unverified)
    with raise_on_all_ranks():
        for key in todo[ranks.rank :: ranks.count]:
            path, sha256 = expected[key]
            if file_sha256(path) != sha256:
                raise ValueError(
                    f"{path} is damaged (its sha256 differs from shards.json); restore it from a copy, or delete the "
                    f"shard set and prepare it again."
                )
    with raise_on_all_ranks():
        if ranks.is_first and expected:
            folder.note("running", **{VERIFIED: {key: _signature(path) for key, (path, _) in expected.items()}})


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
