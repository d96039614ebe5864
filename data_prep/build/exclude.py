"""The images that `exclude` names: opened, listed and hashed, so that near-duplicates of them are not stored in train.

--exclude SHARDS    a shard set, local or remote: the images of its split test
--exclude FOLDER    a folder of images: all images in it and below
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.build.skips import SkipLimit, TooManySkips, skip
from data_prep.common.progress import progress
from data_prep.common.workers import in_workers
from data_prep.config import DataConfig
from data_prep.images.decode import BadImage, Decoder
from data_prep.images.near_duplicates import THUMBNAIL, Look, NearDuplicates, look_of
from data_prep.palette.codec import decode
from data_prep.shards.addresses import hide_secrets
from data_prep.shards.format import MANIFEST
from data_prep.shards.reader import ShardSet, Split, open_shard_set
from data_prep.shards.remote import is_remote
from data_prep.sources.base import ImageFiles, Names, fingerprint
from data_prep.sources.folders import IgnoredEntries, entries_of, entry_kind, images_below, listed, loose_images
from data_prep.sources.image_folder import SPLITS

logger = logging.getLogger(__name__)

SPLIT = "test"
"""The split of a shard set that is excluded."""
CHUNK = 256
"""Images that a worker hashes at a time."""


class StoredImages:
    """The images of a shard set's split, as stored: at its resolution, in the colors of its palette."""

    def __init__(self, shard_set: ShardSet, split: Split) -> None:
        self.shard_set, self.split = shard_set, split

    def __len__(self) -> int:
        return self.split.images

    def name(self, index: int) -> str:
        return f"{SPLIT} {index} of {self.shard_set.path}"

    def images(self, indices: range) -> Iterator[np.ndarray]:
        """uint8 (R, R, 3) each."""
        tokens, _ = self.split.gather(np.arange(indices.start, indices.stop))
        yield from decode(tokens, self.shard_set.palette, self.shard_set.resolution)


class FolderImages:
    """The image files of a folder."""

    def __init__(self, files: ImageFiles) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files.name(index)

    def images(self, indices: range) -> Iterator[np.ndarray | BadImage]:
        """uint8 (H, W, 3) each, or why it can't be used."""
        for index in indices:
            try:
                yield self.files.image(index, Decoder())
            except BadImage as bad:
                yield bad


@dataclass(frozen=True)
class ExcludedSet:
    """One value of `exclude`."""

    path: str
    """Without secrets."""
    kind: str
    """shard set or folder."""
    name: str
    digest: str
    """Of a shard set, its digest; of a folder, of the names and sizes of its images."""
    contents: StoredImages | FolderImages

    @property
    def identity(self) -> str:
        """What must be equal to resume; the path is not in it, as for `palette.file`."""
        return f"{self.kind} {self.name} sha256 {self.digest}"


class Hashed(NamedTuple):
    """A chunk of excluded images."""

    numbers: np.ndarray
    """int64 (n,): of the images that are usable and not flat; the others are not hashed."""
    codes: np.ndarray
    """uint64 (n,)."""
    thumbnails: np.ndarray
    """uint8 (n, 192)."""
    bad: list[BadImage]


def open_excluded(places: Sequence[str]) -> list[ExcludedSet]:
    """Opens shard sets and lists folders; decodes nothing.

    Raises ValueError naming what is missing, has no images, or is given twice.
    """
    opened = [_open(place) for place in places]
    for number, one in enumerate(opened):
        if one.identity in (other.identity for other in opened[:number]):
            raise ValueError(f"exclude has {one.path} twice, or a copy of it; remove one.")
    return opened


def _open(place: str) -> ExcludedSet:
    path = Path(place)
    if is_remote(place) or (path / MANIFEST).is_file():
        return _shard_set(place if is_remote(place) else path)
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise ValueError(f"exclude {place} {found}; it must be a shard set or a folder of images.")
    return _folder(path)


def _shard_set(location: str | Path) -> ExcludedSet:
    shard_set = open_shard_set(location)
    if SPLIT not in shard_set.splits:
        raise ValueError(
            f"exclude {shard_set.path} is a shard set with only {', '.join(shard_set.splits)}; it must have test, "
            f"whose images are excluded: name another set, or a folder of the images."
        )
    images = StoredImages(shard_set, shard_set.split(SPLIT))
    return ExcludedSet(str(shard_set.path), "shard set", shard_set.name, shard_set.digest, images)


def _folder(path: Path) -> ExcludedSet:
    ignored = IgnoredEntries()
    entries = entries_of(path, ignored)
    folders = [entry.name for entry in entries if entry_kind(entry) == "folder"]
    splits = [name for name in folders if name.lower() in chain.from_iterable(SPLITS.values())]
    if splits:
        choice = next((name for name in splits if name.lower() in SPLITS[SPLIT]), splits[0])
        raise ValueError(
            f"exclude {path} has folders of splits ({listed([f'{name}/' for name in splits])}); name the one whose "
            f"images are to be excluded, such as {path / choice}."
        )
    below = (images_below(path, name, ignored) for name in folders)
    names = sorted(chain(loose_images(entries, ignored), *below))
    if not names:
        found = f"; ignored {ignored}" if str(ignored) else ""
        raise ValueError(
            f"exclude {path} has no {MANIFEST} and no images; it must be a complete shard set, or a folder of images"
            f"{found}."
        )
    digest = fingerprint(f"{name} {_size(path / name)}" for name in names)
    images = FolderImages(ImageFiles(str(path), names, np.full(len(names), -1)))
    return ExcludedSet(hide_secrets(str(path)), "folder", path.resolve().name, digest, images)


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else -1  # a broken link is an unreadable image


def read_excluded(excluded: Sequence[ExcludedSet], config: DataConfig, workers: int) -> NearDuplicates | None:
    """Hashes the images of all sets; None if there are none.

    Raises ValueError if more than max_skipped of a set can't be decoded, or if all images are flat.
    """
    if not excluded:
        return None
    names: list[str] = []
    hashed: list[Hashed] = []
    for one in excluded:
        if isinstance(one.contents, StoredImages) and one.contents.shard_set.address is None:
            one.contents.shard_set.verify([SPLIT])  # of a remote set, each file is compared as it is downloaded
        found = _hash(one, config.max_skipped, workers)
        names += [one.contents.name(index) for chunk in found for index in chunk.numbers.tolist()]
        hashed += found
    codes = np.concatenate([chunk.codes for chunk in hashed])
    thumbnails = np.concatenate([chunk.thumbnails for chunk in hashed])
    return NearDuplicates(codes, thumbnails, Names(names), config.exclude_distance)


def _hash(one: ExcludedSet, max_skipped: float, workers: int) -> list[Hashed]:
    """The chunks of a set, in order."""
    images = len(one.contents)
    chunks = [range(start, min(start + CHUNK, images)) for start in range(0, images, CHUNK)]
    limit, kept = SkipLimit(max_skipped, images), list[Hashed]()
    hashed = in_workers(_hash_chunk, one, chunks, workers)
    try:
        with progress("exclude", images, "images") as advance, closing(hashed):
            for chunk, found in zip(chunks, hashed, strict=True):
                kept.append(found)
                limit.add(len(chunk), [skip("excluded", bad) for bad in found.bad])
                advance(len(chunk))
    except TooManySkips as error:
        raise ValueError(f"exclude {one.path}: {error}.") from error
    used = sum(len(found.codes) for found in kept)
    flat = images - used - len(limit.skips)
    if not used:
        raise ValueError(
            f"exclude {one.path} has {images:,} images, all of them flat or unusable; it must have others."
        )
    logger.info(
        f"exclude {one.path}: {images:,} images of a {one.kind}, {flat:,} flat and {len(limit.skips):,} unusable ones "
        f"are not searched"
    )
    return kept


def _hash_chunk(one: ExcludedSet, indices: range) -> Hashed:
    """Arrays, as a look has five times the bytes that are compared."""
    looks: list[tuple[int, Look]] = []
    bad: list[BadImage] = []
    for index, image in zip(indices, one.contents.images(indices), strict=True):
        if isinstance(image, BadImage):
            bad.append(image)
        elif not (look := look_of(image)).is_flat:
            looks.append((index, look))
    thumbnails = np.array([look.thumbnail for _, look in looks], np.uint8)
    return Hashed(
        np.array([index for index, _ in looks], np.int64),
        np.array([look.code for _, look in looks], np.uint64),
        thumbnails.reshape(len(looks), 3 * THUMBNAIL**2),
        bad,
    )


def describe_excluded(excluded: Sequence[ExcludedSet], near_duplicates: NearDuplicates | None) -> dict[str, Any]:
    """For the manifest: which images are excluded, and the digest of their hashes; nothing if there are none."""
    if near_duplicates is None:
        return {}
    hashes = hashlib.sha256(near_duplicates.codes.astype("<u8").tobytes() + near_duplicates.thumbnails.tobytes())
    sets = [{"name": one.name, "kind": one.kind, "images": len(one.contents), "sha256": one.digest} for one in excluded]
    return {
        "excluded": {
            "hashed": len(near_duplicates.codes),
            "hashes_sha256": hashes.hexdigest(),
            "sets": sets,
        }
    }
