"""PNGs and JPEGs without their metadata, for files whose texts or profiles keep Pillow from reading the pixels."""

import zlib
from collections.abc import Iterator

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


def without_metadata(content: bytes) -> Iterator[bytes]:
    """The file with its pixels and its orientation only, in up to two forms, the second with less of the orientation.

    Nothing for files that are neither a PNG nor a JPEG, or that have no metadata.
    """
    if content.startswith(SIGNATURE):
        chunks = [(kind, chunk) for kind, chunk in _chunks(content) if kind in PIXELS or _orients(kind, chunk)]
        exif_only = [chunk for kind, chunk in chunks if kind in (*PIXELS, b"eXIf")]  # Pillow limits the texts' sizes
        forms = [SIGNATURE + b"".join(kept) for kept in ([chunk for _, chunk in chunks], exif_only)]
    elif content.startswith(JPEG_START):
        segments = list(jpeg_segments(content))
        end = segments[-1][2] if segments else len(JPEG_START)
        kept = [content[start:end] for marker, start, end in segments if marker not in JPEG_METADATA]
        forms = [JPEG_START + b"".join(kept) + content[end:]]
    else:
        return
    for form in forms:
        if len(form) < len(content):
            yield form
            content = form


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
