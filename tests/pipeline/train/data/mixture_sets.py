"""Small shard sets whose images name their set and their number, for tests of mixtures."""

import json
from pathlib import Path

import numpy as np

from data_prep.palette.codec import palette_sha256
from data_prep.shards.format import VERSION
from tests.data_prep.small_data import write_shard

RESOLUTION = 4


def write_numbered_set(
    folder: Path, mark: int, images: int, valid: int = 4, resolution: int = RESOLUTION, red: float = 0.0
) -> Path:
    """A set whose image i starts with the tokens (mark, i); records of up to 9 images, three in a shard.

    red: of the palette's first color, which makes it another palette.
    """
    folder.mkdir(parents=True)
    random = np.random.default_rng(mark)
    splits = {}
    for split, count in (("train", images), ("valid", valid)):
        tokens = random.integers(0, 512, (count, resolution**2)).astype(np.uint16)
        tokens[:, 0], tokens[:, 1] = mark, np.arange(count)
        records, start = [], 0
        while start < count:
            size = int(random.integers(1, 10))
            part = tokens[start : start + size]
            records.append((part, np.zeros(len(part), np.int32)))
            start += size
        shards = [
            write_shard(folder / f"{split}-{number:06d}.tar", records[first : first + 3])
            for number, first in enumerate(range(0, len(records), 3))
        ]
        splits[split] = {"images": count, "shards": shards}
    palette = np.zeros((512, 3), np.float32)
    palette[0, 0] = red
    np.save(folder / "palette.npy", palette)
    manifest = {
        "format": "image-gpt-shards",
        "version": VERSION,
        "source": {"name": f"numbered {mark}"},
        "resolution": resolution,
        "classes": ["a"],
        "palette": {"colors": 512, "sha256": palette_sha256(palette)},
        "splits": splits,
    }
    (folder / "shards.json").write_text(json.dumps(manifest))
    return folder
