"""Packs the first shards of a set for a machine without a network: python -m tests.benchmarks.accelerator.pack

The archive is half as large as the set: a token takes 16 bits of a shard and has 9.
"""

import argparse
import sys
import tarfile
import tempfile
from pathlib import Path

from data_prep.common.files import read_json, write_json
from data_prep.shards.format import MANIFEST, PALETTE

PRESET = 3
"""Of xz: a higher one takes several times as long and saves little."""


def first_shards(shards: list[dict[str, object]], images: int) -> list[dict[str, object]]:
    """As many of the shards as have this many images."""
    taken, count = [], 0
    for shard in shards:
        if count >= images:
            break
        taken.append(shard)
        count += int(str(shard["images"]))
    return taken


def pack(shards: Path, archive: Path, images: int) -> None:
    """Writes a set of the first `images` or more of train, and of the first shards of valid and test."""
    manifest = read_json(shards / MANIFEST)
    splits = {}
    for name, wanted in (("train", images), ("valid", 1), ("test", 1)):
        taken = first_shards(manifest["splits"][name]["shards"], wanted)
        splits[name] = manifest["splits"][name] | {"shards": taken, "images": sum(shard["images"] for shard in taken)}
    manifest["splits"] = splits
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, tarfile.open(archive, "w:xz", preset=PRESET) as tar:
        write_json(Path(folder) / MANIFEST, manifest)
        tar.add(Path(folder) / MANIFEST, MANIFEST)
        for name in (PALETTE, *(shard["file"] for split in splits.values() for shard in split["shards"])):
            tar.add(shards / name, name)


def main() -> int:
    """Prints the size of what was packed."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.accelerator.pack")
    parser.add_argument("shards", type=Path, help="The shard set.")
    parser.add_argument("archive", type=Path, help="The .tar.xz to write.")
    parser.add_argument("--images", type=int, default=32_000, help="Training images, rounded up to whole shards.")
    options = parser.parse_args()
    pack(options.shards, options.archive, options.images)
    print(f"{options.archive}: {options.archive.stat().st_size / 1e6:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
