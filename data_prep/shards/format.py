"""The format of a shard set: packed records in plain WebDataset tars, and a manifest that is written last.

    SHARDS/train-000000.tar ...   records `<key>.pixels.npy` uint16 (n, T) and `<key>.labels.npy` int32 (n,)
    SHARDS/palette.npy            float32 (V, 3)
    SHARDS/shards.json            the manifest: the configuration, and size, digests and offsets of each shard

The manifest has the offset of each array in its tar, so a reader maps the tar into memory and needs no copy. A set may
also be remote (see remote.py); then each shard is copied into a local cache when it is first needed.
"""

import zlib
from typing import Any

import numpy as np

from data_prep.common.files import json_digest

MANIFEST = "shards.json"
PALETTE = "palette.npy"
FORMAT = "image-gpt-shards"
VERSION = 2
IMAGES_PER_RECORD = 256
RECORDS_PER_SHARD = 32
RECORD_KEYS = ("record_images", "pixels_offsets", "labels_offsets", "record_crc32")
"""Lists in a shard's entry of the manifest, with one number per record."""
SHARD_KEYS = {"file", "images", "bytes", "sha256", *RECORD_KEYS}
PIXELS_DTYPE, LABELS_DTYPE = np.dtype("<u2"), np.dtype("<i4")
TAR_BLOCK = 512
OPEN_SHARDS = 256
"""Largest number of memory maps that a split keeps open; each takes a file descriptor."""
CACHE_VARIABLE = "IGPT_CACHE"
"""Environment variable: the folder into which the files of remote sets are copied."""

Record = tuple[np.ndarray, np.ndarray]
"""Tokens uint16 (n, T) and labels int32 (n,) of up to IMAGES_PER_RECORD images."""


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


def record_crc32(pixels: np.ndarray, labels: np.ndarray) -> int:
    """The checksum of a record: CRC-32 over the bytes of its tokens, then of its labels."""
    pixels, labels = np.ascontiguousarray(pixels, PIXELS_DTYPE), np.ascontiguousarray(labels, LABELS_DTYPE)
    return zlib.crc32(labels.data, zlib.crc32(pixels.data))


def manifest_digest(manifest: dict[str, Any]) -> str:
    """sha256 over the manifest's canonical JSON. It covers every shard's digest, so it identifies the complete set."""
    return json_digest(manifest, separators=(",", ":"))
