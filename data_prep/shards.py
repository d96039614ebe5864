"""Shard sets: packed records in plain WebDataset tars, and the manifest that makes a folder of them whole.

    SHARDS/train-000000.tar ...   records `<key>.pixels.npy` uint16 (n, T) and `<key>.labels.npy` int32 (n,)
    SHARDS/palette.npy            float32 (V, 3)
    SHARDS/shards.json            written last: what the set is, and each shard's size, digests and offsets

The manifest records where each array's first byte lies in its tar, so reading is a memory map away.
"""

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.files import file_sha256, read_json, written_aside
from data_prep.palette import load_palette, palette_sha256

MANIFEST = "shards.json"
PALETTE = "palette.npy"
FORMAT = "image-gpt-shards"
VERSION = 2
IMAGES_PER_RECORD = 256
RECORDS_PER_SHARD = 32
SHARD_KEYS = {"file", "images", "bytes", "sha256", "record_images", "pixels_offsets", "labels_offsets", "record_crc32"}
PIXELS_DTYPE, LABELS_DTYPE = np.dtype("<u2"), np.dtype("<i4")
TAR_BLOCK = 512
OPEN_SHARDS = 256
"""Memory maps a split keeps open; each takes a file descriptor."""

Record = tuple[np.ndarray, np.ndarray]
"""Tokens uint16 (n, T) and labels int32 (n,) of up to IMAGES_PER_RECORD images."""


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


class ShardWriter:
    """Writes one tar, record by record, whole or not at all; `entry` is what the manifest says of it.

    The same records give the same bytes: no times, no owners, no extended headers.
    """

    def __init__(self, path: Path) -> None:
        self.entry: dict[str, Any] = {"file": path.name, "images": 0, "bytes": 0, "sha256": ""}
        self.entry |= {"record_images": [], "pixels_offsets": [], "labels_offsets": [], "record_crc32": []}
        self._path = path
        self._open = ExitStack()

    def __enter__(self) -> "ShardWriter":
        self._aside = self._open.enter_context(written_aside(self._path))
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


def record_crc32(pixels: np.ndarray, labels: np.ndarray) -> int:
    """What a record read on its own is checked by: CRC-32 over the bytes of its tokens, then of its labels."""
    pixels, labels = np.ascontiguousarray(pixels, PIXELS_DTYPE), np.ascontiguousarray(labels, LABELS_DTYPE)
    return zlib.crc32(labels.data, zlib.crc32(pixels.data))


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


class Split:
    """One split of a shard set; images are numbered in file order."""

    def __init__(self, name: str, folder: Path, shards: list[dict[str, Any]], positions: int) -> None:
        """positions: tokens an image, T."""
        self.name, self.folder, self.shards, self.positions = name, folder, shards, positions
        self.record_images = np.array([n for shard in shards for n in shard["record_images"]], np.int64)
        self.record_starts = np.concatenate([[0], np.cumsum(self.record_images)])
        self.images = int(self.record_starts[-1])
        self._places = [
            (number, pixels, labels)
            for number, shard in enumerate(shards)
            for pixels, labels in zip(shard["pixels_offsets"], shard["labels_offsets"], strict=True)
        ]
        self._map = lru_cache(maxsize=OPEN_SHARDS)(self._open_map)

    def _open_map(self, shard: int) -> np.ndarray:
        return np.memmap(self.folder / self.shards[shard]["file"], np.uint8, "r")

    def record(self, index: int) -> Record:
        """Tokens uint16 (n, T) and labels int32 (n,) of one record, as views of the file: read-only."""
        shard, pixels_offset, labels_offset = self._places[index]
        count = int(self.record_images[index])
        data = self._map(shard)
        pixels = np.frombuffer(data, PIXELS_DTYPE, count * self.positions, pixels_offset)
        return pixels.reshape(count, self.positions), np.frombuffer(data, LABELS_DTYPE, count, labels_offset)

    def gather(self, indices: np.ndarray) -> Record:
        """Copies images by number, in the order given: indices (k,) to uint16 (k, T), int32 (k,).

        Raises IndexError for a number outside [0, images).
        """
        indices = np.asarray(indices, np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < self.images:
            raise IndexError(f"images of split {self.name} are numbered 0 to {self.images - 1}")
        pixels = np.empty((len(indices), self.positions), PIXELS_DTYPE)
        labels = np.empty(len(indices), LABELS_DTYPE)
        records = np.searchsorted(self.record_starts, indices, side="right") - 1
        for record in np.unique(records):
            wanted = np.flatnonzero(records == record)
            record_pixels, record_labels = self.record(record)
            rows = indices[wanted] - self.record_starts[record]
            pixels[wanted], labels[wanted] = record_pixels[rows], record_labels[rows]
        return pixels, labels

    def __getstate__(self) -> tuple[Any, ...]:
        return self.name, self.folder, self.shards, self.positions

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__(*state)  # type: ignore[misc]


class ShardSet:
    """A whole shard set, opened. Use `open_shard_set`."""

    def __init__(self, path: Path, manifest: dict[str, Any], palette: np.ndarray) -> None:
        self.path, self.manifest, self.palette = path, manifest, palette
        self.digest: str = manifest_digest(manifest)
        self.name: str = manifest["source"]["name"]
        self.classes: list[str] = manifest["classes"]
        self.resolution: int = manifest["resolution"]
        self.colors: int = manifest["palette"]["colors"]
        self.palette_sha256: str = manifest["palette"]["sha256"]
        self.splits: list[str] = list(manifest["splits"])

    def split(self, name: str) -> Split:
        """Raises ValueError naming the splits there are."""
        if name not in self.manifest["splits"]:
            raise ValueError(f"{self.path} has no split {name!r}; it has {', '.join(self.splits)}.")
        return Split(name, self.path, self.manifest["splits"][name]["shards"], self.resolution**2)

    def verify(self, splits: Iterable[str] | None = None, advance: Callable[[int], None] = lambda images: None) -> None:
        """Re-reads all that the manifest promises of some splits (all, when left out).

        That is each shard's bytes against its digest, each record's place, kind and shape, every token's and
        label's range. `advance` is told the images of each shard read. Raises ValueError naming the first
        file at fault.
        """
        for name in self.splits if splits is None else splits:
            split = self.split(name)
            for shard in split.shards:
                self._verify_shard(split, shard)
                advance(shard["images"])

    def _verify_shard(self, split: Split, shard: dict[str, Any]) -> None:
        path = self.path / shard["file"]
        if file_sha256(path) != shard["sha256"]:
            raise ValueError(f"{path} does not have the sha256 that {MANIFEST} records; it was changed or damaged.")
        promised = zip(shard["record_images"], shard["pixels_offsets"], shard["labels_offsets"], strict=True)
        found = _records_by_reading(path)
        for number, (images, pixels_offset, labels_offset) in enumerate(promised):
            pixels, labels, offsets = next(found, (None, None, None))
            place = f"{path}, record {number}"
            if offsets != (pixels_offset, labels_offset):
                raise ValueError(f"{place} does not lie where {MANIFEST} says.")
            assert pixels is not None and labels is not None
            if pixels.dtype != PIXELS_DTYPE or pixels.shape != (images, split.positions):
                raise ValueError(
                    f"{place} holds {pixels.dtype} {pixels.shape}, not uint16 ({images}, {split.positions})."
                )
            if labels.dtype != LABELS_DTYPE or labels.shape != (images,):
                raise ValueError(f"{place} holds labels {labels.dtype} {labels.shape}, not int32 ({images},).")
            if pixels.size and pixels.max() >= self.colors:
                raise ValueError(f"{place} has token {pixels.max()}; the palette has {self.colors} colours.")
            if labels.size and not -1 <= labels.min() <= labels.max() < len(self.classes):
                raise ValueError(f"{place} has a label outside -1 to {len(self.classes) - 1}.")
        if next(found, None) is not None:
            raise ValueError(f"{path} holds more records than {MANIFEST} says.")


def _records_by_reading(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray, tuple[int, int]]]:
    """The records of a tar by its own headers: tokens, labels, and the offsets of both."""
    with path.open("rb") as file, tarfile.open(fileobj=file) as tar:
        arrays: dict[str, tuple[np.ndarray, int]] = {}
        for member in tar:
            kind = member.name.partition(".")[2]
            content = tar.extractfile(member)
            assert content is not None
            array = np.load(io.BytesIO(content.read()), allow_pickle=False)
            arrays[kind] = array, member.offset_data + member.size - array.nbytes
            if kind == "labels.npy":
                (pixels, pixels_offset), (labels, labels_offset) = arrays.pop("pixels.npy"), arrays.pop(kind)
                yield pixels, labels, (pixels_offset, labels_offset)


def manifest_digest(manifest: dict[str, Any]) -> str:
    """sha256 over the manifest's canonical JSON: it covers every shard's digest, so it names the whole set."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def open_shard_set(path: Path) -> ShardSet:
    """Opens a finished shard set, checking what is cheap: the manifest, the palette, each file's presence and size.

    Raises ValueError naming the folder or file that is missing, foreign, truncated or of another set.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} does not exist; a shard set is a folder that `python -m data_prep shards` wrote.")
    if not (path / MANIFEST).is_file():
        raise ValueError(f"{path} has no {MANIFEST}; it is no shard set, or one whose preparation did not finish.")
    manifest = read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"{path / MANIFEST} is not a manifest of format {FORMAT}, version {VERSION}.")
    try:
        palette = _checked_palette(path, manifest)
        _check_files(path, manifest)
        return ShardSet(path, manifest, palette)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path / MANIFEST} is incomplete ({error!r}); it was changed after it was written."
        ) from error


def _checked_palette(path: Path, manifest: dict[str, Any]) -> np.ndarray:
    promised = manifest["palette"]
    palette = load_palette(path / PALETTE, promised["colors"], key="the palette")
    if palette_sha256(palette) != promised["sha256"]:
        raise ValueError(
            f"{path / PALETTE} has sha256 {palette_sha256(palette)}, {MANIFEST} names {promised['sha256']}; "
            "it is another set's palette."
        )
    return palette


def _check_files(path: Path, manifest: dict[str, Any]) -> None:
    for split in manifest["splits"].values():
        counts = [shard["images"] for shard in split["shards"]]
        if sum(counts) != split["images"] or counts != [sum(shard["record_images"]) for shard in split["shards"]]:
            raise ValueError(f"{path / MANIFEST} contradicts itself; it was changed after it was written.")
        for shard in split["shards"]:
            if not shard.keys() >= SHARD_KEYS:
                raise KeyError(*sorted(SHARD_KEYS - shard.keys()))
            file = path / shard["file"]
            if not file.is_file():
                raise ValueError(f"{file} is missing; copy the shard set again, or delete and prepare it again.")
            if file.stat().st_size != shard["bytes"]:
                size = file.stat().st_size
                raise ValueError(
                    f"{file} has {size} bytes, {MANIFEST} names {shard['bytes']}; it was truncated or changed."
                )
