"""Writes packed records into the tars of a shard set."""

import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common.files import atomic_write, file_sha256
from data_prep.shards.format import LABELS_DTYPE, PIXELS_DTYPE, TAR_BLOCK, Record, record_crc32


class ShardWriter:
    """Adds records to a tar; `entry` is its entry in the manifest. Use `open_shard`."""

    def __init__(self, path: Path, tar: tarfile.TarFile) -> None:
        self.entry: dict[str, Any] = {"file": path.name, "images": 0, "bytes": 0, "sha256": ""}
        self.entry |= {"record_images": [], "pixels_offsets": [], "labels_offsets": [], "record_crc32": []}
        self._key, self._tar = path.stem, tar

    def add(self, record: Record) -> None:
        """Appends one record of at least one image."""
        pixels, labels = record[0].astype(PIXELS_DTYPE), record[1].astype(LABELS_DTYPE)
        assert len(pixels) == len(labels) > 0
        key = f"{self._key}-{len(self.entry['record_images']):03d}"
        self.entry["pixels_offsets"].append(_add_array(self._tar, f"{key}.pixels.npy", pixels))
        self.entry["labels_offsets"].append(_add_array(self._tar, f"{key}.labels.npy", labels))
        self.entry["record_crc32"].append(record_crc32(pixels, labels))
        self.entry["record_images"].append(len(labels))
        self.entry["images"] += len(labels)


@contextmanager
def open_shard(path: Path) -> Iterator[ShardWriter]:
    """Writes one tar, record by record, atomically; the writer's `entry` is complete after the block.

    The same records give the same bytes: the tar has no times, no owners and no extended headers.
    """
    with atomic_write(path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            writer = ShardWriter(path, tar)
            yield writer
        writer.entry |= {"bytes": temporary.stat().st_size, "sha256": file_sha256(temporary)}


def _add_array(tar: tarfile.TarFile, name: str, array: np.ndarray) -> int:
    """Adds an array as .npy. Returns the offset of its data in the tar."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    member = tarfile.TarInfo(name)
    member.size = buffer.tell()
    member.mtime, member.mode = 0, 0o644
    offset = tar.offset + TAR_BLOCK + member.size - array.nbytes
    buffer.seek(0)
    tar.addfile(member, buffer)
    return offset
