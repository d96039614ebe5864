"""Opens, reads and verifies shard sets, in folders and at addresses."""

import io
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common.files import file_sha256, parse_json, read_json
from data_prep.palette.codec import load_palette, palette_sha256, parse_palette
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


class Split:
    """One split of a shard set; images are numbered in file order."""

    def __init__(
        self, name: str, folder: Path, shards: list[dict[str, Any]], positions: int, address: str | None = None
    ) -> None:
        """positions: tokens an image, T. address: from where the files come into `folder`, if they do."""
        self.name, self.folder, self.shards, self.positions, self.address = name, folder, shards, positions, address
        self.record_images = np.array([n for shard in shards for n in shard["record_images"]], np.int64)
        self.record_starts = np.concatenate([[0], np.cumsum(self.record_images)])
        self.images = int(self.record_starts[-1])
        self._places = [
            (number, pixels, labels)
            for number, shard in enumerate(shards)
            for pixels, labels in zip(shard["pixels_offsets"], shard["labels_offsets"], strict=True)
        ]
        self.shard_starts = np.concatenate([[0], np.cumsum([len(shard["record_images"]) for shard in shards])])
        """The first record of each shard."""
        self._map = lru_cache(maxsize=OPEN_SHARDS)(self._open_map)

    def file(self, shard: dict[str, Any]) -> Path:
        """Where a shard lies on disk; that of a remote set is copied there first, and checked by its digest.

        Processes may ask for the same one at once. Raises ValueError or OSError naming the address.
        """
        path = self.folder / shard["file"]
        if self.address is not None and not (path.is_file() and path.stat().st_size == shard["bytes"]):
            download(address_of(self.address, shard["file"]), path, shard["bytes"], shard["sha256"])
        return path

    @contextmanager
    def temporary_copy(self, shard: dict[str, Any]) -> Iterator[Path]:
        """`file`, for once: a copy that was not there before is removed again."""
        kept = self.address is None or (self.folder / shard["file"]).is_file()
        path = self.file(shard)
        try:
            yield path
        finally:
            if not kept:
                path.unlink(missing_ok=True)

    def _open_map(self, shard: int) -> np.ndarray:
        return np.memmap(self.file(self.shards[shard]), np.uint8, "r")

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

    def locations(self, indices: Sequence[int]) -> list[str]:
        """Where images lie, for a person: "train-000003.tar record 12 picture 5", all counted from 0."""
        found = []
        for index in indices:
            record = int(np.searchsorted(self.record_starts, index, side="right")) - 1
            shard = int(np.searchsorted(self.shard_starts, record, side="right")) - 1
            number, picture = record - int(self.shard_starts[shard]), index - int(self.record_starts[record])
            found.append(f"{self.shards[shard]['file']} record {number} picture {picture}")
        return found

    def __getstate__(self) -> tuple[Any, ...]:
        return self.name, self.folder, self.shards, self.positions, self.address

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__(*state)  # type: ignore[misc]


class ShardSet:
    """A whole shard set, opened. Use `open_shard_set`."""

    def __init__(self, path: Path | str, manifest: dict[str, Any], palette: np.ndarray) -> None:
        """path: the folder, or the address."""
        self.path, self.manifest, self.palette = path, manifest, palette
        self.digest: str = manifest_digest(manifest)
        self.name: str = manifest["source"]["name"]
        self.classes: list[str] = manifest["classes"]
        self.resolution: int = manifest["resolution"]
        self.colors: int = manifest["palette"]["colors"]
        self.palette_sha256: str = manifest["palette"]["sha256"]
        self.splits: list[str] = list(manifest["splits"])
        self.address = path if isinstance(path, str) else None

    def split(self, name: str) -> Split:
        """Raises ValueError naming the splits there are."""
        if name not in self.manifest["splits"]:
            raise ValueError(
                f"{self.path} has no split {name!r}; it has {', '.join(self.splits)}: name one of these where there is "
                f"a choice, or prepare the set again from a source that has {name} pictures."
            )
        folder = self.path if isinstance(self.path, Path) else cache_folder(self.digest)
        return Split(name, folder, self.manifest["splits"][name]["shards"], self.resolution**2, self.address)

    def verify(self, splits: Iterable[str] | None = None, advance: Callable[[int], None] = lambda images: None) -> None:
        """Re-reads all that the manifest promises of some splits (all, when left out).

        That is each shard's bytes against its digest, each record's place, kind, shape and checksum, every
        token's and label's range. `advance` is told the images of each shard read. Raises ValueError naming the
        first file at fault.
        """
        for name in self.splits if splits is None else splits:
            split = self.split(name)
            for shard in split.shards:
                with split.temporary_copy(shard) as path:
                    self._verify_file(path, split, shard)
                advance(shard["images"])

    def _verify_file(self, path: Path, split: Split, shard: dict[str, Any]) -> None:
        if file_sha256(path) != shard["sha256"]:
            raise ValueError(f"{path} does not have the sha256 that {MANIFEST} records; it was changed or damaged.")
        promised = zip(*(shard[key] for key in RECORD_KEYS), strict=True)
        found = _records_by_reading(path)
        for number, (images, pixels_offset, labels_offset, crc32) in enumerate(promised):
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
            if record_crc32(pixels, labels) != crc32:
                raise ValueError(f"{place} does not have the checksum that {MANIFEST} records.")
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


def cache_folder(digest: str) -> Path:
    """Where the files of the remote set of that digest are kept: below $IGPT_CACHE, or ~/.cache/image-gpt."""
    root = os.environ.get(CACHE_VARIABLE)
    return (Path(root) if root else Path.home() / ".cache" / "image-gpt") / digest


def open_shard_set(path: Path | str) -> ShardSet:
    """Opens a finished shard set in a folder or at an address (https://host/set, s3://..., pipe:cat /mnt/set/{}).

    What is cheap is checked: the manifest, the palette and, in a folder, each file's presence and size. Raises
    ValueError naming the folder or file that is missing, foreign, truncated or of another set.
    """
    place = str(path) if is_remote(str(path)) else Path(path)
    manifest, where = _read_manifest(place)
    if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise ValueError(
            f"{where} is not a manifest of format {FORMAT}, version {VERSION}; prepare the shard set again."
        )
    try:
        _check_manifest(manifest, where)
        if isinstance(place, Path):
            _check_files(place, manifest)
        return ShardSet(place, manifest, _read_palette(place, manifest))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} is incomplete ({error!r}); it was changed after it was written.") from error


def _read_manifest(path: Path | str) -> tuple[Any, str]:
    """The manifest, and its name for messages."""
    if isinstance(path, str):
        where = address_of(path, MANIFEST)
        return parse_json(read_remote(where), where), where
    if not path.is_dir():
        found = "is no folder" if path.exists() else "does not exist"
        raise ValueError(f"{path} {found}; a shard set is a folder that `python -m data_prep shards` wrote.")
    if not (path / MANIFEST).is_file():
        raise ValueError(f"{path} has no {MANIFEST}; it is no shard set, or one whose preparation did not finish.")
    return read_json(path / MANIFEST), str(path / MANIFEST)


def _read_palette(place: Path | str, manifest: dict[str, Any]) -> np.ndarray:
    colors, promised = manifest["palette"]["colors"], manifest["palette"]["sha256"]
    if isinstance(place, Path):
        name = str(place / PALETTE)
        palette = load_palette(place / PALETTE, colors, key="the palette")
    else:
        name = address_of(place, PALETTE)
        palette = parse_palette(read_remote(name), name, colors)
    found = palette_sha256(palette)
    if found != promised:
        raise ValueError(f"{name} has sha256 {found}, {MANIFEST} names {promised}; it is another set's palette.")
    return palette


def _check_manifest(manifest: dict[str, Any], where: str) -> None:
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            if not shard.keys() >= SHARD_KEYS:
                raise KeyError(*sorted(SHARD_KEYS - shard.keys()))
            if Path(shard["file"]).name != shard["file"]:
                raise ValueError(f"{where} names a file {shard['file']!r}; it must lie beside {MANIFEST}.")
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
                size = file.stat().st_size
                raise ValueError(
                    f"{file} has {size} bytes, {MANIFEST} names {shard['bytes']}; it was truncated or changed."
                )
