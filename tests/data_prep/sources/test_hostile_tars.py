"""Tars that are damaged, cut off, no tars at all, or made to do harm: every image before the damage, one line that
says where it is, in bounded time and memory."""

import bz2
import gzip
import io
import lzma
import random
import tarfile
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.config import SourceConfig
from data_prep.images.decode import BadImage
from data_prep.sources.base import Encoded
from data_prep.sources.open import open_source
from tests.data_prep.tar_files import tar_bytes
from tests.data_prep.time_limit import time_limit

SECONDS = 5
BLOCK = 512
IMAGE_EXTENSIONS = [np.random.default_rng(n).bytes(1000 + 700 * n) for n in range(5)]
MEMBERS = [
    (f"{n}.{end}", IMAGE_EXTENSIONS[n] if end == "jpg" else b"%d" % n) for n in range(5) for end in ("cls", "jpg")
]
COMPLETE = tar_bytes(MEMBERS)
ENDS = 2 * BLOCK
"""Bytes of the end-of-archive blocks; a tar is padded after them."""

Outcome = list[Encoded | BadImage]


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """No tar makes a reader loop or wait."""
    with time_limit(SECONDS):
        yield


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Outcome]:
    def read_tar(content: bytes, **options: Any) -> Outcome:
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in/0.tar").write_bytes(content)
        source = open_source(SourceConfig(kind="webdataset", path=str(tmp_path / "in"), **options))
        return [item for stream in source.streams["train"] for item in stream]

    return read_tar


def place(name: str) -> int:
    """The offset of a member's header in COMPLETE."""
    with tarfile.open(fileobj=io.BytesIO(COMPLETE)) as tar:
        return tar.getmember(name).offset


def end(name: str) -> int:
    """The offset after a member's content and padding in COMPLETE."""
    size = len(dict(MEMBERS)[name])
    return place(name) + BLOCK + -(-size // BLOCK) * BLOCK


def changed(at: int, new: bytes, content: bytes = COMPLETE) -> bytes:
    return content[:at] + new + content[at + len(new) :]


def header(name: str, size: int | bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header with a valid checksum; the size as a number, or as the 12 bytes of its field."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def with_header(block: bytes, content: bytes = b"") -> bytes:
    """COMPLETE with other bytes instead of those after 2.jpg."""
    padded = content + bytes(-len(content) % BLOCK)
    return COMPLETE[: end("2.jpg")] + block + padded + COMPLETE[end("2.jpg") :]


def base_256(size: int) -> bytes:
    """A size as GNU tar writes it if it has more than eleven octal digits, or is negative."""
    return (b"\x80" if size >= 0 else b"\xff") + size.to_bytes(11, "big", signed=True)


def pax(name: str, **values: str) -> bytes:
    """A file of two blocks' header with an extended header before it, unchecked."""
    text = b""
    for key, value in values.items():
        record = f" {key.replace('__', '.')}={value}\n".encode()
        length = len(record) + 2
        text += str(length if len(str(length)) == 2 else length + 1).encode() + record
    return header("PaxHeader", len(text), b"x") + text + bytes(-len(text) % BLOCK) + header(name, 2 * BLOCK)


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


HTML = b"<!DOCTYPE html><html><head><title>403 Forbidden</title></head><body>" + b"<p>No.</p>" * 200 + b"</body></html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"
NESTED = header("././@LongLink", 10, tarfile.GNUTYPE_LONGNAME) + b"name".ljust(BLOCK, b"\0")

HOSTILE = {
    # name: (bytes, images before the damage, the byte of the damage or None, what is said of it)
    "a bit of a header": (changed(place("3.cls") + 5, b"\xff"), 3, place("3.cls"), "bad checksum"),
    "a page of zeros": (changed(place("1.jpg"), bytes(4096)), 1, None, "after its end-of-archive blocks"),
    "a page of zeros, then a header": (changed(place("1.cls"), bytes(3584)), 1, None, "after its end-of-archive"),
    "an error message": (b'{"error": "Invalid username"}', 0, 0, 'text that begins with \'{"error": "Invalid'),
    "noise behind the end": (COMPLETE + b"noise" * 4000, 5, None, "after its end-of-archive blocks"),
    "a member behind noise": (COMPLETE[:-ENDS] + b"x".ljust(ENDS) + COMPLETE, 5, None, "after its end-of"),
    "a second tar, cut": (COMPLETE + COMPLETE[: place("1.jpg") + BLOCK], 6, None, "unexpected end of data"),
    "gzip, then a tar": (gzip.compress(COMPLETE) + COMPLETE, 5, None, "after its compressed data"),
    "bzip2, then a tar": (bz2.compress(COMPLETE) + COMPLETE, 5, None, "after its compressed data"),
    "xz, then a tar": (lzma.compress(COMPLETE) + COMPLETE, 5, None, "after its compressed data"),
    "zstd": (b"\x28\xb5\x2f\xfd" + np.random.default_rng(5).bytes(5000), 0, 0, "it is compressed with zstd"),
    "a pointer of Git LFS": (LFS, 0, 0, "it is a pointer of Git LFS, not the file itself (run `git lfs pull`)"),
    "a bit of the first header": (changed(5, b"\xff"), 0, 0, "bad checksum"),
    "a block lost": (COMPLETE[: place("3.jpg") + BLOCK] + COMPLETE[place("3.jpg") + 2 * BLOCK :], None, None, ""),
    "a page of a file system lost": (changed(place("2.cls"), b"\xe5" * 4096), 2, place("2.cls"), "invalid header"),
    "cut in an image": (COMPLETE[: place("3.jpg") + BLOCK + 100], 3, place("3.jpg"), "unexpected end of data"),
    "cut in the padding": (COMPLETE[: end("3.jpg") - 1], 4, end("3.jpg"), "unexpected end of data"),
    "cut in a label": (COMPLETE[: place("3.cls") + BLOCK], 3, place("3.cls"), "unexpected end of data"),
    "cut in a header": (COMPLETE[: place("3.jpg") + 100], 3, place("3.jpg"), "truncated header"),
    "cut between members": (COMPLETE[: end("3.jpg")], 4, end("3.jpg"), "no end-of-archive blocks"),
    "no mark of the end": (COMPLETE[: end("4.jpg")], 5, end("4.jpg"), "no end-of-archive blocks"),
    "nothing": (b"", 0, 0, "it is empty"),
    "an error page": (HTML, 0, 0, "it is an HTML page"),
    "a short error page": (HTML[:200], 0, 0, "truncated header"),
    "noise": (np.random.default_rng(9).bytes(100_000), 0, 0, ""),
    "a zip file": (b"PK\3\4" + bytes(2000), 0, 0, ""),
    "a parquet file": (b"PAR1" + np.random.default_rng(3).bytes(5000) + b"PAR1", 0, 0, ""),
    "gzip, cut": (gzip.compress(COMPLETE, mtime=0)[:-3000], None, None, "end-of-stream"),
    "gzip, then noise": (b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + np.random.default_rng(4).bytes(5000), 0, 0, ""),
    "gzip, of an error page": (gzip.compress(HTML), 0, 0, ""),
    "gzip, nothing but its mark": (b"\x1f\x8b\x08", 0, 0, ""),
    "bzip2, cut": (bz2.compress(COMPLETE)[:-3000], 0, 0, ""),
    "xz, cut": (lzma.compress(COMPLETE)[:-3000], None, None, ""),
    "8 GiB claimed": (with_header(header("x.jpg", 0o77777777777)), 3, end("2.jpg"), "has the size 8589934591"),
    "an exabyte claimed": (with_header(header("x.jpg", base_256(1 << 60))), 3, end("2.jpg"), "has the size"),
    "an exabyte of text claimed": (with_header(header("x.txt", base_256(1 << 60))), 3, end("2.jpg"), "has the size"),
    "less than nothing": (with_header(header("x.jpg", base_256(-BLOCK))), 3, end("2.jpg"), "has the size -512"),
    "back to the beginning": (with_header(header("x.txt", base_256(-10_000))), 3, end("2.jpg"), "has the size"),
    "no number": (with_header(header("x.jpg", b"a lot of it\0")), 3, end("2.jpg"), "invalid header"),
    "900 MB claimed": (with_header(header("x.jpg", 900_000_000)), 3, end("2.jpg"), "unexpected end of data"),
    "900 MB of text claimed": (with_header(header("x.txt", 900_000_000)), 3, None, "unexpected end of data"),
    "a name of 900 MB": (
        with_header(header("././@LongLink", 900_000_000, tarfile.GNUTYPE_LONGNAME)),
        *(3, end("2.jpg"), "has the size"),
    ),
    "extended: an exabyte": (with_header(pax("x.jpg", size=str(1 << 60))), 3, end("2.jpg"), "has the size"),
    "extended: less than nothing": (with_header(pax("x.jpg", size="-5120")), 3, end("2.jpg"), "has the size -5120"),
    "extended: nonsense": (
        with_header(header("PaxHeader", 20, b"x"), b"0 a=b\n".ljust(20)),
        *(3, end("2.jpg"), ""),
    ),
    "extended: no end": (COMPLETE[: end("2.jpg")] + header("PaxHeader", BLOCK, b"x"), 3, end("2.jpg"), ""),
    "names without end": (with_header(NESTED * 3000), 3, end("2.jpg"), ""),
    "a long name, then damage": (with_header(NESTED + b"\xff" * BLOCK), 3, end("2.jpg"), "bad checksum"),
    "a sparse map of nonsense": (
        with_header(
            pax("x.jpg", GNU__sparse__major="1", GNU__sparse__minor="0", GNU__sparse__realsize="99"), b"x\n" * 512
        ),
        *(3, end("2.jpg"), ""),
    ),
    "a sparse map without end": (
        with_header(
            pax("x.jpg", GNU__sparse__major="1", GNU__sparse__minor="0", GNU__sparse__realsize="99"), b"9" * 1024
        ),
        *(3, end("2.jpg"), ""),
    ),
    "an old sparse map without end": (
        COMPLETE[: end("2.jpg")] + changed(482, b"\1", header("x.jpg", BLOCK, tarfile.GNUTYPE_SPARSE)),
        *(3, end("2.jpg"), ""),
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_images_before_the_damage_are_read_and_its_offset_is_reported(case: str, read: Callable[..., Outcome]) -> None:
    content, images, byte, what = HOSTILE[case]
    *before, last = read(content)
    assert isinstance(last, BadImage)
    assert last.reason == "damaged tar"
    assert what in last.detail
    if byte is not None:
        assert last.name.endswith(f"0.tar at byte {byte}")
    if images is not None:
        assert [(item.content, item.label) for item in before] == list(
            zip(2 * IMAGE_EXTENSIONS, [*range(5), *range(5)][:images], strict=False)
        )


def test_a_lost_block_shifts_the_rest(read: Callable[..., Outcome]) -> None:
    """The image without the block has a block of what follows instead: the decoder has to detect that."""
    found = read(HOSTILE["a block lost"][0])
    assert [item.label for item in found[:4] if isinstance(item, Encoded)] == [0, 1, 2, 3]
    assert [item.content for item in found[:3] if isinstance(item, Encoded)] == IMAGE_EXTENSIONS[:3]
    assert len(found) == 5


@pytest.mark.parametrize("case", ["gzip, cut", "xz, cut"])
def test_a_damaged_compressed_tar_returns_the_images_before_the_damage(case: str, read: Callable[..., Outcome]) -> None:
    *before, _ = read(HOSTILE[case][0])
    assert [item.content for item in before if isinstance(item, Encoded)] == IMAGE_EXTENSIONS[: len(before)]
    assert len(before) < 5


def test_a_changed_byte_in_gzip_is_detected(read: Callable[..., Outcome]) -> None:
    """Noise can't be compressed, so a changed byte changes an image and the checksum, which is seen only if the file
    is read to its end: it is damage, or at least another image."""
    content = gzip.compress(COMPLETE, mtime=0)
    for at in range(300, len(content) - 10, 997):
        found = read(changed(at, bytes([content[at] ^ 0x10]), content))
        changed_images = [item for item in found if isinstance(item, Encoded) and item.content not in IMAGE_EXTENSIONS]
        assert changed_images or isinstance(found[-1], BadImage)


@pytest.mark.parametrize(
    "content",
    [
        COMPLETE,
        COMPLETE[: -len(COMPLETE) % BLOCK or None].rstrip(b"\0") + bytes(BLOCK * 4),
        COMPLETE[: end("4.jpg")] + bytes(BLOCK),  # one block of zeros, as some writers leave it
        gzip.compress(COMPLETE),
        gzip.compress(COMPLETE[:3000]) + gzip.compress(COMPLETE[3000:]),  # as pigz and bgzip write
        gzip.compress(COMPLETE) + b"noise after the end",
        bz2.compress(COMPLETE),
        lzma.compress(COMPLETE),
        tar_bytes(MEMBERS, tarfile.GNU_FORMAT),
        tar_bytes(MEMBERS, tarfile.PAX_FORMAT),
        COMPLETE + b"\n",
        COMPLETE[:-ENDS] + b"noise after the mark of the end".ljust(ENDS),
    ],
)
def test_complete_tars_of_every_kind(content: bytes, read: Callable[..., Outcome]) -> None:
    assert [(item.content, item.label) for item in read(content) if isinstance(item, Encoded)] == list(
        zip(IMAGE_EXTENSIONS, range(5), strict=True)
    )
    assert len(read(content)) == 5


@pytest.mark.parametrize(
    "content",
    [
        COMPLETE + COMPLETE,
        COMPLETE[: end("4.jpg")] + bytes(ENDS) + COMPLETE,  # without the padding of the last record
        COMPLETE[: end("4.jpg")] + bytes(BLOCK) + COMPLETE,
        COMPLETE + bytes(200 * BLOCK) + COMPLETE,
        COMPLETE[: end("4.jpg")] + bytes(ENDS) + COMPLETE + tar_bytes([]),
        COMPLETE + tar_bytes([]) + COMPLETE,
        tar_bytes(MEMBERS, tarfile.PAX_FORMAT) + tar_bytes(MEMBERS, tarfile.GNU_FORMAT),
        gzip.compress(COMPLETE) + gzip.compress(COMPLETE),
        gzip.compress(COMPLETE + COMPLETE),
        bz2.compress(COMPLETE) + bz2.compress(COMPLETE),
        lzma.compress(COMPLETE) + lzma.compress(COMPLETE),
    ],
)
def test_concatenated_tars_are_read_to_the_last(content: bytes, read: Callable[..., Outcome]) -> None:
    """As `cat a.tar b.tar` makes them; tarfile reads the second only with ignore_zeros."""
    with tarfile.open(fileobj=io.BytesIO(content), ignore_zeros=True) as tar:
        files = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    assert len(files) == 20
    expected = [file for name, file in files if name.endswith(".jpg")]
    assert [item.content for item in read(content) if isinstance(item, Encoded)] == expected
    assert len(read(content)) == 10


def test_a_tar_without_members_has_no_images(read: Callable[..., Outcome]) -> None:
    assert read(tar_bytes([])) == []


def test_members_that_are_not_files_are_ignored_and_nothing_is_written(
    read: Callable[..., Outcome], tmp_path: Path
) -> None:
    outside = tmp_path / "outside.jpg"
    outside.write_bytes(b"secret")
    members = [
        special("a.jpg", tarfile.SYMTYPE, str(outside)),
        special("b.jpg", tarfile.LNKTYPE, "0.jpg"),
        special("c.jpg", tarfile.CHRTYPE),
        special("d.jpg", tarfile.BLKTYPE),
        special("e.jpg", tarfile.FIFOTYPE),
        special("f.jpg", tarfile.DIRTYPE),
        special("g.jpg", b"V"),
        (f"{tmp_path}/absolute.jpg", b"absolute"),
        ("../../up.jpg", b"up"),
    ]
    found = read(tar_bytes([*MEMBERS, *members]))
    assert [item.content for item in found if isinstance(item, Encoded)] == [*IMAGE_EXTENSIONS, b"absolute", b"up"]
    assert len(found) == 7
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["0.tar", "in", "outside.jpg"]


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(kind: int, read: Callable[..., Outcome]) -> None:
    names = ["d" * 300 + "/picture", "写真", "e" * 90 + "/" + "f" * 200]
    found = read(tar_bytes([(f"{name}.jpg", name.encode()) for name in names], kind))
    assert [item.content.decode() for item in found if isinstance(item, Encoded)] == names
    assert [item.name.partition(".jpg in ")[0] for item in found] == names


def test_names_that_are_not_utf8_can_be_printed(read: Callable[..., Outcome]) -> None:
    (found,) = read(tar_bytes([(b"caf\xe9.jpg".decode(errors="surrogateescape"), b"A")]))
    assert found.name.encode().startswith(b"caf\\udce9.jpg in ")


def test_sparse_files(read: Callable[..., Outcome]) -> None:
    """As `tar --sparse --format=pax` writes it: 512 bytes of content after a hole of 4096."""
    extended = pax("GNUSparseFile/x.jpg", GNU__sparse__major="1", GNU__sparse__minor="0", GNU__sparse__name="x.jpg")
    size = pax("x", GNU__sparse__realsize="4608")
    text = extended[BLOCK : 2 * BLOCK].rstrip(b"\0") + size[BLOCK : 2 * BLOCK].rstrip(b"\0")
    block = header("PaxHeader", len(text), b"x") + text.ljust(BLOCK, b"\0") + header("GNUSparseFile/x.jpg", 2 * BLOCK)
    found = read(with_header(block, b"1\n4096\n512\n".ljust(BLOCK, b"\0") + b"y" * BLOCK))
    assert isinstance(found[3], Encoded)
    assert found[3].content == bytes(4096) + b"y" * BLOCK
    assert len(found) == 6


def test_a_bomb_takes_no_memory(read: Callable[..., Outcome]) -> None:
    """200 MB of zeros in one member: as a text that is ignored, and as a name."""
    size = 200_000_000
    for first in (header("x.txt", size), header("././@LongLink", size, tarfile.GNUTYPE_LONGNAME)):
        bomb = gzip.compress(first + bytes(size + -size % BLOCK) + COMPLETE, compresslevel=1)
        tracemalloc.start()
        found = read(bomb)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 << 20, peak
        assert len(found) == (6 if first.startswith(b"x.txt") else 1)


def test_an_image_with_a_truncated_label_does_not_become_unlabelled(read: Callable[..., Outcome]) -> None:
    """If the label follows its image, the last image before the damage is lost too."""
    pairs = tar_bytes([(f"{n}.{end}", b"%d" % n) for n in range(3) for end in ("jpg", "cls")])
    found = read(pairs[: 5 * 2 * BLOCK + 10])
    assert [item.label for item in found if isinstance(item, Encoded)] == [0, 1]
    bare = tar_bytes([(f"{n}.{end}", b"%d" % n) for n in range(3) for end in ("jpg", "txt")])
    found = read(bare[: 5 * 2 * BLOCK + 10])
    assert [item.label for item in found if isinstance(item, Encoded)] == [-1, -1, -1]


def test_random_damage(read: Callable[..., Outcome]) -> None:
    """Bytes are changed, removed and inserted at random: images and skips are returned, and damage last."""
    chance = random.Random(0)
    outcomes: Counter[str] = Counter()
    for _ in range(300):
        content = bytearray(COMPLETE)
        for _ in range(chance.choice([1, 1, 3, 20])):
            at, length = chance.randrange(len(content)), chance.choice([1, 1, 8, BLOCK, 3000])
            content[at : at + chance.choice([0, length])] = chance.randbytes(chance.choice([0, 1, length]))
        found = read(bytes(content))
        damaged = [isinstance(item, BadImage) and item.reason == "damaged tar" for item in found]
        assert not any(damaged[:-1])
        outcomes["damaged" if any(damaged) else "whole"] += 1
    assert min(outcomes.values()) > 20, outcomes


def test_random_headers(read: Callable[..., Outcome]) -> None:
    """Headers of random kinds, sizes and names with valid checksums, so that each is accepted at first."""
    chance = random.Random(1)
    for _ in range(300):
        blocks = []
        for _ in range(chance.randrange(1, 8)):
            kind = bytes([chance.choice(b"0125LKSxgX7\0")])
            size = chance.choice([0, 1, 511, 700, base_256(-1), base_256(chance.getrandbits(40)), chance.randbytes(12)])
            blocks.append(
                header(f"{chance.randrange(3)}.jpg", size, kind) + chance.randbytes(chance.choice([0, 512, 1024]))
            )
        found = read(b"".join(blocks) + COMPLETE)
        assert sum(isinstance(item, BadImage) and item.reason == "damaged tar" for item in found) <= 1


@pytest.mark.parametrize("size", [0, 700, 0o77777777777, base_256(1 << 60), base_256(-10_000)])
def test_the_headers_of_this_file_are_valid(size: int | bytes) -> None:
    """Otherwise the tests above would only show that tarfile finds the errors of this file."""
    expected = size if isinstance(size, int) else int.from_bytes(size[1:], "big", signed=True)
    assert tarfile.TarInfo.frombuf(header("x.jpg", size), "utf-8", "strict").size == expected
