"""WebDataset tars of images, such as img2dataset and webdataset write, local or remote, read as streams.

    00000.tar   000000000.jpg 000000000.json 000000000.txt 000000001.jpg ...

The members of one image are consecutive and share a key: their path up to the first dot of the file name.
No member is written to disk, so absolute names, `..` and links are harmless.
"""

import json
import logging
import re
import tarfile
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.config import SourceConfig
from data_prep.images.decode import BadImage
from data_prep.shards.addresses import hide_secrets, without_signatures
from data_prep.shards.remote import is_remote, open_remote
from data_prep.sources.base import MAX_CLASSES, UNLABELLED, Encoded, ImageStream, Source, fingerprint
from data_prep.sources.folders import SPLIT_WORD, SUFFIXES, TRAIN_WORDS, in_system_folder
from data_prep.sources.image_folder import SPLITS
from data_prep.sources.tar_stream import MEMBER_LIMIT, DamagedTar, Tar
from data_prep.sources.where import Where, quoted

logger = logging.getLogger(__name__)

FIRST_EXTENSIONS = (
    *("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm"),
    *("jfif", "jpe", "avif", "jp2", "j2k", "pgm", "pnm"),
)
IMAGE_EXTENSIONS = (*FIRST_EXTENSIONS, *sorted({suffix[1:] for suffix in SUFFIXES}.difference(FIRST_EXTENSIONS)))
"""Extensions of images. If several members have one key, the first extension counts; others may be masks."""
TAR_NAME = re.compile(r"[^.].*\.(tar|tar\.gz|tgz|tar\.bz2|tar\.xz)")
UNREADABLE_TAR_NAME = re.compile(r"[^.].*\.(tar\.(zst|zstd|lz4|lzma|lz|br|Z)|tzst)")
"""Names of tars whose compression can't be read."""
META_NAME = re.compile(r"__[^/]*__($|/)")
"""Members with metadata of the tar; webdataset ignores them."""
KEY_AND_EXTENSION = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
"""webdataset's own expression (base_plus_ext). It is copied since importing webdataset imports torch in each worker."""
LABEL_LIMIT = 1 << 24
"""Largest size of a .cls or .json that is read, in bytes."""


def open_source(config: SourceConfig) -> Source:
    """Lists the tars. Opens none of them, and sends no requests for remote tars; for source.where it reads the first
    of each split.

    Raises ValueError for a folder without tars, for tars of an ambiguous split, a missing tar, unbalanced braces, or a
    column of source.where that no image in the first tar of a split has.
    """
    assert config.path is not None
    path = Path(config.path)
    if not is_remote(config.path) and path.is_dir():
        tars, name = _tars_of_folder(path), path.resolve().name
    else:
        tars, name = {"train": _expanded(config.path)}, _name(hide_secrets(config.path))
    where = None if config.where is None else Where(config.where)
    if where is not None:
        for found in tars.values():
            _check_columns(where, found)
    streams: dict[str, list[ImageStream]] = {
        split: [
            Tars(found[first : first + config.tars_per_shard], config.label_column, where)
            for first in range(0, len(found), config.tars_per_shard)
        ]
        for split, found in tars.items()
    }
    label = ".cls, where there is one" if config.label_column is None else f"{config.label_column!r} of the .json"
    facts = {"tars": {split: len(found) for split, found in tars.items()}, "label": label}
    parts = (f"{split}/{identity}" for split, found in tars.items() for identity in _identities(found))
    return Source(name, [], {}, streams, fingerprint(parts), facts=facts)


def _tars_of_folder(root: Path) -> dict[str, list[str]]:
    """The tars of each split: those in train/ and so on, or all in `root` as train."""
    folders = {split: [root / name for name in names if (root / name).is_dir()] for split, names in SPLITS.items()}
    found = {split: _tars_in(present[0]) for split, present in folders.items() if present}
    for split, present in folders.items():
        if len(present) > 1:
            raise ValueError(f"source.path {root} has {present[0].name}/ and {present[1].name}/ for {split}; keep one.")
    if found:
        beside = next((file.name for file in sorted(root.iterdir()) if TAR_NAME.fullmatch(file.name)), None)
        if beside is not None:
            logger.warning(f"source.path {root} has {beside} beside folders of splits; it is not read")
        if "train" not in found:
            raise ValueError(
                f"source.path {root} has a folder {next(iter(found))}/ but no train/; it must have train/."
            )
        return found
    tars = _tars_in(root)
    marked = _split_words(tars)
    if set(marked) <= {None, *TRAIN_WORDS}:
        return {"train": tars}
    examples = ", ".join(sorted({Path(tar).name for tar in marked.values()}))
    raise ValueError(
        f"source.path {root} has tars of {_listed(marked)} in one folder, and all would become train ({examples}); "
        f"move them into folders train/, valid/ and test/, or select the training tars with braces, {{00..99}}.tar."
    )


def _listed(words: Iterable[str | None]) -> str:
    *others, last = sorted(word or "no named split" for word in words)
    return f"{', '.join(others)} and {last}" if others else last


def _split_words(tars: list[str]) -> dict[str | None, str]:
    """The words for a split in the names of tars, and a tar for each; None stands for the names without one."""
    words = ((SPLIT_WORD.findall(Path(tar).name.lower()) or [None], tar) for tar in reversed(tars))
    return {word: tar for found, tar in words for word in found}


def _tars_in(folder: Path) -> list[str]:
    files = sorted(file for file in folder.iterdir() if file.is_file())
    unreadable = next((file for file in files if UNREADABLE_TAR_NAME.fullmatch(file.name)), None)
    if unreadable is not None:
        raise ValueError(
            f"{unreadable} can't be read; tars must be uncompressed or compressed with gzip, bzip2 or xz: decompress "
            f"it, or read it with a command, such as 'pipe:zstd -dc {unreadable}'."
        )
    tars = [str(file) for file in files if TAR_NAME.fullmatch(file.name)]
    if not tars:
        raise ValueError(f"{folder} has no tars; it must contain tars such as 00000.tar, or a folder train/ of tars.")
    return tars


def _expanded(pattern: str) -> list[str]:
    """The paths or URLs that an expression with braces expands to."""
    from braceexpand import braceexpand

    shown = hide_secrets(pattern)
    try:
        addresses = list(braceexpand(pattern))
    except ValueError as error:
        raise ValueError(f"source.path {shown} has unbalanced braces; they must be like {{00..99}}.") from error
    for address in addresses:
        if not is_remote(address) and not Path(address).is_file():
            missing = pattern if pattern == address else f"{pattern}: {address}"
            raise ValueError(f"source.path {missing} does not exist; it must be a folder of tars, or tars in braces.")
        if is_remote(address) and address.endswith("/"):
            raise ValueError(
                f"source.path {shown} is a folder; remote tars must be listed with braces, {{00000..00099}}.tar."
            )
    words = set(_split_words(addresses))
    if len(addresses) > 1 and not words <= {None, *TRAIN_WORDS}:
        logger.warning(f"source.path {shown} selects tars of {_listed(words)}; all of them become train")
    return addresses


def _name(pattern: str) -> str:
    """The name of the source: that of the folder of the tars."""
    parts = re.split(r"[/\s]+", pattern.partition("{")[0] + "x")
    return next((part for part in reversed(parts[:-1]) if part.strip(".")), "webdataset")


def _identities(tars: list[str]) -> list[str]:
    """What identifies each tar of a split, for the fingerprint: not the signatures of URLs, unless nothing else does.

    So an interrupted preparation resumes with newly signed URLs.
    """
    names = [
        without_signatures(tar) if is_remote(tar) else f"{Path(tar).name} {Path(tar).stat().st_size}" for tar in tars
    ]
    return names if len(set(names)) == len(names) or not is_remote(tars[0]) else tars


class Tars:
    """An `ImageStream`: one or more tars, read one after the other."""

    def __init__(self, addresses: list[str], label_column: str | None, where: Where | None = None) -> None:
        self.addresses, self.label_column, self.where = addresses, label_column, where
        first, last = hide_secrets(addresses[0]), hide_secrets(addresses[-1])
        self.name = first if first == last else f"{first} to {last}"

    def __iter__(self) -> Iterator[Encoded | BadImage]:
        """A damaged tar ends with a BadImage with the reason "damaged tar"; then the next tar follows.

        Raises ValueError naming a tar that does not exist, and OSError for a tar that can't be read to its end, such
        as after a failure of the network, which is not damage.
        """
        for address in self.addresses:
            for sample in read_tar(address, self.label_column, self.where is not None):
                if isinstance(sample, BadImage):
                    yield sample
                else:
                    yield from sample.outcomes(self.label_column, self.where)


def read_tar(
    address: str, label_column: str | None, needs_json: bool = False
) -> Generator["Sample | BadImage", None, None]:
    """The samples of one tar, with one in memory at a time; then a BadImage if the tar is damaged.

    needs_json: whether the .json is read too if it does not have the labels.
    """
    labels, shown = "cls" if label_column is None else "json", hide_secrets(address)
    sample: Sample | None = None
    expects_label = label_column is not None
    with open_remote(address) as file:
        tar = Tar(file)
        try:
            while member := tar.next():
                key, extension = key_and_extension(member)
                if key is None:
                    continue
                if sample is None or key != sample.key or extension in sample.extensions:
                    if sample:
                        expects_label = expects_label or sample.label is not None
                        yield sample
                    sample = Sample(key, shown)
                sample.extensions.append(extension)
                if extension in IMAGE_EXTENSIONS[: sample.rank]:
                    sample.content, sample.name = tar.content(member, MEMBER_LIMIT), member.name
                    sample.rank = IMAGE_EXTENSIONS.index(extension)
                elif extension == labels or (needs_json and extension == "json"):
                    content = tar.content(member, LABEL_LIMIT)
                    sample.label = content if extension == labels else sample.label
                    sample.json = content if extension == "json" else sample.json
            if sample:
                yield sample
        except DamagedTar as damage:
            # If images have labels, an image whose label is lost must not become an unlabelled image.
            expected = [sample.label] * expects_label + [sample.json] * needs_json if sample else []
            if sample and sample.content is not None and None not in expected:
                yield sample
            yield BadImage(f"{shown} at byte {tar.offset}", "damaged tar", str(damage))


def key_and_extension(member: tarfile.TarInfo) -> tuple[str | None, str]:
    """The key by which webdataset groups members, and the extension. The key is None for members to ignore.

    Hidden files are ignored, such as `dir/._a.jpg`, which macOS adds for each file; webdataset takes `dir/` as key.
    System folders are ignored too, such as `@eaDir/a.jpg/thumbnail.jpg`.
    """
    parts = KEY_AND_EXTENSION.fullmatch(member.name)
    if not member.isreg() or parts is None or parts[1].endswith("/") or META_NAME.match(member.name):
        return None, ""
    if in_system_folder(member.name):
        return None, ""
    return parts[1], parts[2].lower()


@dataclass
class Sample:
    """The members with one key that are used."""

    key: str
    shown: str
    """The address of the tar, for messages."""
    extensions: list[str] = field(default_factory=list)
    name: str = ""
    rank: int = len(IMAGE_EXTENSIONS)
    """The index in IMAGE_EXTENSIONS of the extension of `content`."""
    content: bytes | None = None
    label: bytes | None = None
    """The content of the .cls, or of the .json if it has the labels."""
    json: bytes | None = None
    """The content of the .json, if it is needed."""

    def outcomes(self, label_column: str | None, where: Where | None) -> Iterator[Encoded | BadImage]:
        """The image with its label, or the reason why it can't be used or is excluded.

        Dots in the names of several images give them one key, such as www of www.site_1.jpg: each of them is counted.
        """
        if self.content is None:
            images = [extension for extension in self.extensions if extension.split(".")[-1] in IMAGE_EXTENSIONS]
            present = _printable(", ".join(f".{extension}" for extension in self.extensions[:5]))
            detail = f"it has {present}, but no .jpg, .png or the like"
            if images:
                detail = "its name has several dots, and the key ends at the first; rename it"
            for name in [f"{self.key}.{extension}" for extension in images] or [self.key]:
                yield BadImage(_printable(f"{name} in {self.shown}"), "not a picture", detail)
            return
        name = _printable(f"{self.name} in {self.shown}")
        try:
            refusal = None if where is None else where.refusal_of_untyped(self.columns())
            if refusal is not None:
                yield BadImage(name, refusal)
            else:
                yield Encoded(name, self.content, _label(self.label, label_column))
        except ValueError as error:
            yield BadImage(name, "damaged", str(error))

    def columns(self) -> dict[str, Any]:
        """The fields of the .json; none without it. Raises ValueError if it can't be read."""
        return {} if self.json is None else _record(self.json)


def _check_columns(where: Where, tars: list[str]) -> None:
    """Raises ValueError for a column that no image in the first tar has, or if the last image read has another type.

    Reads no further than to the first image that has all columns. A tar without images is not the first.
    """
    for tar in tars:
        name, found, row = "", dict[str, Any](), dict[str, Any]()
        with closing(read_tar(tar, None, needs_json=True)) as samples:
            for sample in samples:
                if isinstance(sample, BadImage) or sample.content is None:
                    continue
                with suppress(ValueError):  # listed as damaged when its tar is prepared
                    name, row = f"{sample.name} in {sample.shown}", sample.columns()
                    found |= row
                if all(row.get(column) is not None for column in where.columns):
                    break
        if name:
            break
    missing = [column for column in where.columns if column not in found]
    if missing:
        names = f"the fields {', '.join(sorted(found))}" if found else "no .json with fields"
        raise ValueError(
            f"source.where is {quoted(where.expression)}, but no image in {hide_secrets(tar)} has {missing[0]!r}; "
            f"its images have {_printable(names)}."
        )
    where.check(row, _printable(name))


def _label(text: bytes | None, column: str | None) -> int:
    """The class from a .cls, or from a field of a .json. Raises ValueError if it is invalid."""
    if column is None:
        if text is None:
            return UNLABELLED
        value: Any = text.decode("utf-8-sig", errors="backslashreplace").strip()
    else:
        value = _column(text, column)
    if not re.fullmatch(r"[0-9]{1,10}", str(value)) or int(value) >= MAX_CLASSES:
        where = "" if column is None else f" in the field {column!r}"
        shown = _printable(repr(value))[:60]
        raise ValueError(f"its label is {shown}{where}, not an integer from 0 to {MAX_CLASSES - 1:,}")
    return int(value)


def _column(text: bytes | None, column: str) -> Any:
    if text is None:
        raise ValueError("it has no .json with its label")
    record = _record(text)
    if column not in record:
        raise ValueError(f"its .json has no field {column!r}")
    return record[column]


def _record(text: bytes) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("its .json can't be read") from error
    return record if isinstance(record, dict) else {}


def _printable(text: str) -> str:
    """The text with escapes for what is not UTF-8, as names in a tar may be."""
    return text.encode(errors="backslashreplace").decode()
