"""Opens, reads and verifies shard sets, local and remote."""

import io
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.common.contents import described_file
from data_prep.common.files import file_sha256, parse_json, read_json
from data_prep.palette.codec import load_palette, palette_sha256, parse_palette
from data_prep.shards.addresses import hide_secrets
from data_prep.shards.format import (
    CACHE_VARIABLE,
    FORMAT,
    LABELS_DTYPE,
    MANIFEST,
    OPEN_SHARDS,
    PALETTE,
    PIXELS_DTYPE,
    RECORD_KEYS,
    SHARD_KEYS,
    VERSION,
    Record,
    manifest_digest,
    record_crc32,
)
from data_prep.shards.remote import address_of, download, is_remote, read_remote

GATHERED_AT_ONCE = 4_096
"""Images for which objects of Python are created at once, when they are gathered."""
IMAGES_OF_A_RECORD = 32
"""With at least so many images of each record, gathering them record by record is faster."""


class _Field(NamedTuple):
    """Where the values of images are in their shards."""

    offsets: np.ndarray
    """Where those of each record's first image begin: int64 (records,), in bytes."""
    dtype: np.dtype[Any]
    length: int
    """Values of an image."""


class Split:
    """One split of a shard set; images are numbered in file order."""

    def __init__(
        self, name: str, folder: Path, shards: list[dict[str, Any]], positions: int, address: str | None = None
    ) -> None:
        """positions: tokens per image, T. address: the URL from which files are copied into `folder`, if remote."""
        self.name, self.folder, self.shards, self.positions, self.address = name, folder, shards, positions, address
        self.record_images = np.array([n for shard in shards for n in shard["record_images"]], np.int64)
        self.record_starts = np.concatenate([[0], np.cumsum(self.record_images)])
        self.images = int(self.record_starts[-1])
        records = [len(shard["record_images"]) for shard in shards]
        self._record_shards = np.repeat(np.arange(len(shards)), records)
        pixels = np.array([n for shard in shards for n in shard["pixels_offsets"]], np.int64)
        labels = np.array([n for shard in shards for n in shard["labels_offsets"]], np.int64)
        self._pixels, self._labels = _Field(pixels, PIXELS_DTYPE, self.positions), _Field(labels, LABELS_DTYPE, 1)
        self.shard_starts = np.concatenate([[0], np.cumsum(records, dtype=np.int64)])
        """The index of the first record of each shard."""
        self._map = lru_cache(maxsize=OPEN_SHARDS)(self._open_map)

    def file(self, shard: dict[str, Any]) -> Path:
        """The path of a shard. A remote shard is downloaded first, and compared with its digest.

        Several processes may call this for the same shard. Raises ValueError or OSError naming the URL.
        """
        path = self.folder / shard["file"]
        if self.address is not None and not (path.is_file() and path.stat().st_size == shard["bytes"]):
            download(address_of(self.address, shard["file"]), path, shard["bytes"], shard["sha256"])
        return path

    @contextmanager
    def temporary_copy(self, shard: dict[str, Any]) -> Iterator[Path]:
        """Yields `file(shard)`; if that had to download the shard, removes it afterwards."""
        existed = self.address is None or (self.folder / shard["file"]).is_file()
        path = self.file(shard)
        try:
            yield path
        finally:
            if not existed:
                path.unlink(missing_ok=True)

    def _open_map(self, shard: int) -> memoryview:
        return np.memmap(self.file(self.shards[shard]), np.uint8, "r").data

    def record(self, index: int) -> Record:
        """Tokens uint16 (n, T) and labels int32 (n,) of one record, as views of the file: read-only."""
        count, data = int(self.record_images[index]), self._map(int(self._record_shards[index]))
        pixels = np.frombuffer(data, PIXELS_DTYPE, count * self.positions, self._pixels.offsets[index])
        labels = np.frombuffer(data, LABELS_DTYPE, count, self._labels.offsets[index])
        return pixels.reshape(count, self.positions), labels

    def gather(self, indices: np.ndarray) -> Record:
        """Copies images by index, in the given order: indices (k,) to tokens uint16 (k, T), labels int32 (k,).

        Raises IndexError for an index outside [0, images).
        """
        tokens, labels = self._gather(indices, [self._pixels, self._labels])
        return tokens, labels[:, 0]

    def gather_tokens(self, indices: np.ndarray) -> np.ndarray:
        """The tokens alone, as of `gather`: uint16 (k, T)."""
        return self._gather(indices, [self._pixels])[0]

    def _gather(self, indices: np.ndarray, fields: list[_Field]) -> list[np.ndarray]:
        """The values of each field, (k, length)."""
        indices = np.asarray(indices, np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < self.images:
            raise IndexError(f"images of split {self.name} are numbered 0 to {self.images - 1}")
        if len(indices) <= GATHERED_AT_ONCE:
            return self._copy(indices, fields)
        gathered = [np.empty((len(indices), field.length), field.dtype) for field in fields]
        for first in range(0, len(indices), GATHERED_AT_ONCE):
            some = slice(first, first + GATHERED_AT_ONCE)
            for result, values in zip(gathered, self._copy(indices[some], fields), strict=True):
                result[some] = values
        return gathered

    def _copy(self, indices: np.ndarray, fields: list[_Field]) -> list[np.ndarray]:
        """The images of a shuffled batch come from nearly as many records, so a loop over the records, or one array
        operation an image, would take most of the time. Slices of memory views are joined in C.
        """
        records = np.searchsorted(self.record_starts, indices, side="right") - 1
        rows = indices - self.record_starts[records]
        distinct = sorted(set(records.tolist()))
        if IMAGES_OF_A_RECORD * len(distinct) <= len(indices):
            return self._copy_by_record(records, rows, distinct, fields)
        shards = self._record_shards[records].tolist()
        maps = {shard: self._map(shard) for shard in set(shards)}
        copied = []
        for field in fields:
            size = field.length * field.dtype.itemsize
            starts = (field.offsets[records] + rows * size).tolist()
            slices = [maps[shard][start : start + size] for shard, start in zip(shards, starts, strict=True)]
            copied.append(np.frombuffer(bytearray().join(slices), field.dtype).reshape(len(indices), field.length))
        return copied

    def _copy_by_record(
        self, records: np.ndarray, rows: np.ndarray, distinct: list[int], fields: list[_Field]
    ) -> list[np.ndarray]:
        copied = [np.empty((len(rows), field.length), field.dtype) for field in fields]
        for record in distinct:
            wanted = np.flatnonzero(records == record)
            count, data = int(self.record_images[record]), self._map(int(self._record_shards[record]))
            for result, field in zip(copied, fields, strict=True):
                values = np.frombuffer(data, field.dtype, count * field.length, field.offsets[record])
                result[wanted] = values.reshape(count, field.length)[rows[wanted]]
        return copied

    def locations(self, indices: Sequence[int]) -> list[str]:
        """The locations of images, for messages: "train-000003.tar record 12 image 5", all numbered from 0."""
        found = []
        for index in indices:
            record = int(np.searchsorted(self.record_starts, index, side="right")) - 1
            shard = int(np.searchsorted(self.shard_starts, record, side="right")) - 1
            number, image = record - int(self.shard_starts[shard]), index - int(self.record_starts[record])
            found.append(f"{self.shards[shard]['file']} record {number} image {image}")
        return found

    def __getstate__(self) -> tuple[Any, ...]:
        return self.name, self.folder, self.shards, self.positions, self.address

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__(*state)  # type: ignore[misc]


class ShardSet:
    """A complete shard set. Use `open_shard_set`."""

    def __init__(self, path: Path | str, manifest: dict[str, Any], palette: np.ndarray) -> None:
        """path: the folder, or the URL."""
        self.path = hide_secrets(path) if isinstance(path, str) else path
        """For messages; a URL is without its secrets."""
        self.manifest, self.palette = manifest, palette
        self.digest: str = manifest_digest(manifest)
        self.name: str = manifest["source"]["name"]
        self.classes: list[str] = manifest["classes"]
        self.resolution: int = manifest["resolution"]
        self.colors: int = manifest["palette"]["colors"]
        self.palette_sha256: str = manifest["palette"]["sha256"]
        self.splits: list[str] = list(manifest["splits"])
        self.address = path if isinstance(path, str) else None
        """The URL with its secrets, if the set is remote."""

    def split(self, name: str) -> Split:
        """Raises ValueError naming the existing splits."""
        if name not in self.manifest["splits"]:
            raise ValueError(
                f"{self.path} has no split {name!r}; it has {', '.join(self.splits)}: choose one of these where the "
                f"split is an option, use another set, or prepare this one again from a source with {name} images."
            )
        folder = self.path if isinstance(self.path, Path) else cache_folder(self.digest)
        return Split(name, folder, self.manifest["splits"][name]["shards"], self.resolution**2, self.address)

    @property
    def images_in_train(self) -> dict[str, int]:
        """By split, `train` excepted: how many of its images are also in train; empty if they were not counted."""
        splits = self.manifest["splits"].items()
        return {name: split["images_in_train"] for name, split in splits if "images_in_train" in split}

    def verify(
        self,
        splits: Iterable[str] | None = None,
        advance: Callable[[int], None] = lambda images: None,
        record: Callable[[str, np.ndarray], None] = lambda split, tokens: None,
    ) -> None:
        """Reads some splits (default: all) and compares them with the manifest.

        Compared are the digest of each shard, the offset, type, shape and checksum of each record, and the range of all
        tokens and labels. `advance` is called with the number of images of each shard read, `record` with the split and
        tokens of each record. Raises ValueError naming the first file that differs.
        """
        for name in self.splits if splits is None else splits:
            split = self.split(name)
            for shard in split.shards:
                with split.temporary_copy(shard) as path:
                    for tokens in self._verified_tokens(path, split, shard):
                        record(name, tokens)
                advance(shard["images"])

    def _verified_tokens(self, path: Path, split: Split, shard: dict[str, Any]) -> Iterator[np.ndarray]:
        if file_sha256(path) != shard["sha256"]:
            raise ValueError(f"{path} does not have the sha256 in {MANIFEST}; it was changed or damaged.")
        expected = zip(*(shard[key] for key in RECORD_KEYS), strict=True)
        found = _records_of_tar(path)
        for number, (images, pixels_offset, labels_offset, crc32) in enumerate(expected):
            pixels, labels, offsets = next(found, (None, None, None))
            record = f"{path}, record {number}"
            if offsets != (pixels_offset, labels_offset):
                raise ValueError(f"{record} is not at the offset in {MANIFEST}.")
            assert pixels is not None and labels is not None
            if pixels.dtype != PIXELS_DTYPE or pixels.shape != (images, split.positions):
                raise ValueError(
                    f"{record} contains {pixels.dtype} {pixels.shape}, not uint16 ({images}, {split.positions})."
                )
            if labels.dtype != LABELS_DTYPE or labels.shape != (images,):
                raise ValueError(f"{record} contains labels {labels.dtype} {labels.shape}, not int32 ({images},).")
            if pixels.size and pixels.max() >= self.colors:
                raise ValueError(f"{record} has token {pixels.max()}, but the palette has {self.colors} colors.")
            if labels.size and not -1 <= labels.min() <= labels.max() < len(self.classes):
                raise ValueError(f"{record} has a label outside -1 to {len(self.classes) - 1}.")
            if record_crc32(pixels, labels) != crc32:
                raise ValueError(f"{record} does not have the checksum in {MANIFEST}.")
            yield pixels
        if next(found, None) is not None:
            raise ValueError(f"{path} contains more records than {MANIFEST} lists.")


def _records_of_tar(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray, tuple[int, int]]]:
    """The records of a tar, read by its own headers: tokens, labels, and the offsets of both."""
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


def cache_folder(digest: str) -> Path:
    """The local folder for files of the remote set with this digest, in $IGPT_CACHE, or in ~/.cache/image-gpt."""
    root = os.environ.get(CACHE_VARIABLE)
    return (Path(root) if root else Path.home() / ".cache" / "image-gpt") / digest


def open_shard_set(path: Path | str) -> ShardSet:
    """Opens a finished shard set, given its folder or URL (https://host/set, s3://..., pipe:cat /mnt/set/{}).

    Checks what is cheap to check: the manifest, the palette, and in a folder the presence and size of each file.
    Raises ValueError naming the folder or file that is missing, truncated, of another format or of another set.
    """
    location = str(path) if is_remote(str(path)) else Path(path)
    manifest, where = _read_manifest(location)
    if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise ValueError(
            f"{where} is not a manifest of format {FORMAT}, version {VERSION}; prepare the shard set again."
        )
    try:
        _check_manifest(manifest, where)
        if isinstance(location, Path):
            _check_files(location, manifest)
        return ShardSet(location, manifest, _read_palette(location, manifest))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} is incomplete ({error!r}); it was changed after it was written.") from error


def _read_manifest(path: Path | str) -> tuple[Any, str]:
    """The manifest, and its name for messages."""
    if isinstance(path, str):
        where = address_of(path, MANIFEST)
        return parse_json(read_remote(where), hide_secrets(where)), hide_secrets(where)
    if not path.is_dir():
        found = "is not a folder" if path.exists() else "does not exist"
        raise ValueError(f"{path} {found}; it must be a folder written by `python -m data_prep shards`.")
    if not (path / MANIFEST).is_file():
        raise ValueError(f"{path} has no {MANIFEST}; it is not a shard set, or its preparation is not finished.")
    return read_json(path / MANIFEST), str(path / MANIFEST)


def _read_palette(location: Path | str, manifest: dict[str, Any]) -> np.ndarray:
    colors, expected = manifest["palette"]["colors"], manifest["palette"]["sha256"]
    if isinstance(location, Path):
        name = str(location / PALETTE)
        palette = load_palette(location / PALETTE, colors, key="the palette")
    else:
        address = address_of(location, PALETTE)
        name = hide_secrets(address)
        palette = parse_palette(read_remote(address), name, colors)
    found = palette_sha256(palette)
    if found != expected:
        raise ValueError(f"{name} has sha256 {found}, but {MANIFEST} has {expected}; it is another set's palette.")
    return palette


def _check_manifest(manifest: dict[str, Any], where: str) -> None:
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            if not shard.keys() >= SHARD_KEYS:
                raise KeyError(*sorted(SHARD_KEYS - shard.keys()))
            if Path(shard["file"]).name != shard["file"]:
                raise ValueError(f"{where} lists the file {shard['file']!r}; it must be in the folder of {MANIFEST}.")
        counts = [shard["images"] for shard in split["shards"]]
        of_records = [sum(shard["record_images"]) for shard in split["shards"]]
        lengths = {tuple(len(shard[key]) for key in RECORD_KEYS) for shard in split["shards"]}
        if sum(counts) != split["images"] or counts != of_records or any(len(set(found)) > 1 for found in lengths):
            raise ValueError(f"{where} contradicts itself; it was changed after it was written.")


def _check_files(path: Path, manifest: dict[str, Any]) -> None:
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            file = path / shard["file"]
            if not file.is_file():
                raise ValueError(f"{file} is missing; copy the shard set again, or delete and prepare it again.")
            if file.stat().st_size != shard["bytes"]:
                if known := described_file(file):
                    raise ValueError(f"{file} is {known}; it must be a tar of {shard['bytes']:,} bytes.")
                size = file.stat().st_size
                raise ValueError(
                    f"{file} has {size} bytes, but {MANIFEST} has {shard['bytes']}; it was truncated or changed."
                )
