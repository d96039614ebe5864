"""Writes packed records into the tars of a shard set."""

import io
import tarfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common.files import atomic_write, file_sha256
from data_prep.shards.format import LABELS_DTYPE, PIXELS_DTYPE, TAR_BLOCK, Record, record_crc32


class ShardWriter:
    """Writes one tar, record by record, atomically; `entry` is what the manifest says of it.

    The same records give the same bytes: no times, no owners, no extended headers.
    """

    def __init__(self, path: Path) -> None:
        self.entry: dict[str, Any] = {"file": path.name, "images": 0, "bytes": 0, "sha256": ""}
        self.entry |= {"record_images": [], "pixels_offsets": [], "labels_offsets": [], "record_crc32": []}
        self._path = path
        self._open = ExitStack()

    def __enter__(self) -> "ShardWriter":
        self._aside = self._open.enter_context(atomic_write(self._path))
        self._open.callback(self._describe)
        self._tar = self._open.enter_context(tarfile.open(self._aside, "w", format=tarfile.USTAR_FORMAT))
        return self

    def add(self, record: Record) -> None:
        """Appends one record of at least one image."""
        pixels, labels = record[0].astype(PIXELS_DTYPE), record[1].astype(LABELS_DTYPE)
        assert len(pixels) == len(labels) > 0
        key = f"{self._path.stem}-{len(self.entry['record_images']):03d}"
        self.entry["pixels_offsets"].append(_add_array(self._tar, f"{key}.pixels.npy", pixels))
        self.entry["labels_offsets"].append(_add_array(self._tar, f"{key}.labels.npy", labels))
        self.entry["record_crc32"].append(record_crc32(pixels, labels))
        self.entry["record_images"].append(len(labels))
        self.entry["images"] += len(labels)

    def _describe(self) -> None:
        """Between the end of the tar and its appearance under its name."""
        self.entry["bytes"] = self._aside.stat().st_size
        self.entry["sha256"] = file_sha256(self._aside)

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)


def write_shard(path: Path, records: Iterable[Record]) -> dict[str, Any]:
    """Writes one tar and returns its entry in the manifest."""
    with ShardWriter(path) as writer:
        for record in records:
            writer.add(record)
    return writer.entry


def _add_array(tar: tarfile.TarFile, name: str, array: np.ndarray) -> int:
    """Adds an array as .npy. Returns the offset in the tar of its first number."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    member = tarfile.TarInfo(name)
    member.size = buffer.tell()
    member.mtime, member.mode = 0, 0o644
    offset = tar.offset + TAR_BLOCK + member.size - array.nbytes
    buffer.seek(0)
    tar.addfile(member, buffer)
    return offset
