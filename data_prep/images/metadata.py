"""PNGs, JPEGs and TIFFs without metadata, for files whose texts or profiles keep Pillow from reading the pixels."""

import zlib
from collections.abc import Container, Iterable, Iterator
from typing import Literal

SIGNATURE = b"\x89PNG\r\n\x1a\n"
PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
"""The chunks of a PNG that its pixels depend on."""
ORIENTING_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
"""Keywords of texts in a PNG that may have its orientation."""
JPEG_START = b"\xff\xd8"
START_OF_SCAN, APP1 = 0xDA, 0xE1
"""Markers of a JPEG. APP1: Exif, which may have its orientation."""
JPEG_METADATA = {*range(0xE2, 0xEE), 0xEF, 0xFE}
"""Markers of applications and comments. Excluded: APP0, APP1, and Adobe's APP14, which states how colors are stored."""
TIFF_ORDERS: dict[bytes, Literal["little", "big"]] = {b"II*\0": "little", b"MM\0*": "big"}
_RANGES = (range(256, 260), range(277, 280), range(292, 294), range(320, 326), range(512, 522), range(529, 533))
PIXEL_TAGS = {262, 266, 273, 284, 317, 338, 339, 347}.union(*_RANGES)
"""The tags of a TIFF that its pixels depend on: sizes, samples, colors, strips, tiles, and options of compressions."""
ORIENTATION = 274


def without_metadata(content: bytes) -> Iterator[bytes]:
    """The file with its pixels and its orientation only, in up to two forms, the second with less of the orientation.

    Nothing for files of other formats, or that have no metadata.
    """
    forms: Iterable[bytes] = ()
    if content.startswith(SIGNATURE):
        forms = _forms_of_png(content)
    elif content.startswith(JPEG_START):
        forms = [_jpeg_without_metadata(content)]
    elif content.startswith(tuple(TIFF_ORDERS)):
        forms = [_tiff_with_tags(content, tags) for tags in ({*PIXEL_TAGS, ORIENTATION}, PIXEL_TAGS)]
    for form in forms:
        if form != content:
            yield form
            content = form


def _forms_of_png(content: bytes) -> Iterator[bytes]:
    chunks = [(kind, chunk) for kind, chunk in _chunks(content) if kind in PIXELS or _orients(kind, chunk)]
    yield SIGNATURE + b"".join(chunk for _, chunk in chunks)
    # Pillow limits the sizes of texts.
    yield SIGNATURE + b"".join(chunk for kind, chunk in chunks if kind in (*PIXELS, b"eXIf"))


def _jpeg_without_metadata(content: bytes) -> bytes:
    segments = list(jpeg_segments(content))
    end = segments[-1][2] if segments else len(JPEG_START)
    remaining = (content[start:stop] for marker, start, stop in segments if marker not in JPEG_METADATA)
    return JPEG_START + b"".join(remaining) + content[end:]


def _tiff_with_tags(content: bytes, wanted: set[int]) -> bytes:
    """The TIFF with these tags of its first directory alone; unchanged if that is cut off."""
    order, start, fields = _tiff_directory(content)
    if start + 12 * len(fields) > len(content):
        return content
    remaining = [field for tag, field in fields if tag in wanted]
    directory = len(remaining).to_bytes(2, order) + b"".join(remaining) + bytes(4)
    end = start + 12 * len(fields)
    return content[: start - 2] + directory.ljust(end + 2 - start, b"\0") + content[end:]


def lost_tags(content: bytes, known: Container[int]) -> bool:
    """Whether Pillow did not take all tags of a TIFF that its pixels depend on: it stops at the first damaged tag.

    known: the tags that it took. It takes none without values.
    """
    if not content.startswith(tuple(TIFF_ORDERS)):
        return False
    _, start, fields = _tiff_directory(content)
    cut_off = start + 12 * len(fields) > len(content)
    return cut_off or any(tag in PIXEL_TAGS and tag not in known and any(field[4:8]) for tag, field in fields)


def _tiff_directory(content: bytes) -> tuple[Literal["little", "big"], int, list[tuple[int, bytes]]]:
    """The byte order of a TIFF, where the fields of its first directory start, and (tag, field) of each."""
    order = TIFF_ORDERS[content[:4]]
    start = int.from_bytes(content[4:8], order) + 2
    end = start + 12 * int.from_bytes(content[start - 2 : start], order)
    fields = [content[place : place + 12] for place in range(start, end, 12)]
    return order, start, [(int.from_bytes(field[:2], order), field) for field in fields]


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(kind, chunk with its length and checksum) of each chunk of a PNG; the last may be cut off."""
    position = len(SIGNATURE)
    while position < len(content):
        end = position + 12 + int.from_bytes(content[position : position + 4], "big")
        yield content[position + 4 : position + 8], content[position:end]
        position = end


def _orients(kind: bytes, chunk: bytes) -> bool:
    """Whether a chunk may have an orientation and is not damaged."""
    may_orient = kind == b"eXIf" or chunk[8:].startswith(ORIENTING_TEXTS)
    return may_orient and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")


def jpeg_segments(content: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of a JPEG's complete segments before its first scan; the marker is the first two bytes."""
    position = len(JPEG_START)
    while position + 4 <= len(content) and content[position] == 0xFF:
        marker = content[position + 1]
        if marker == 0xFF:  # markers may be padded
            position += 1
            continue
        end = position + 2 + int.from_bytes(content[position + 2 : position + 4], "big")
        if marker == START_OF_SCAN or end > len(content):
            return
        yield marker, position, end
        position = end
