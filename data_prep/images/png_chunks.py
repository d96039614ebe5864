"""A PNG without its metadata, for files whose texts, profile or dates keep Pillow from reading the pixels."""

import zlib
from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"
PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
"""The chunks that the pixels depend on."""
ORIENTATIONS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
"""Keywords of the texts in which an orientation may be stored, besides the chunk eXIf."""


def without_metadata(content: bytes) -> Iterator[bytes]:
    """A PNG with its pixels and its orientation only; then with its pixels only. Nothing where that changes nothing."""
    if not content.startswith(SIGNATURE):
        return
    kept = [(kind, chunk) for kind, chunk in _chunks(content) if kind in PIXELS or _orients(kind, chunk)]
    for wanted in (kept, [(kind, chunk) for kind, chunk in kept if kind in PIXELS]):
        shorter = SIGNATURE + b"".join(chunk for _, chunk in wanted)
        if len(shorter) < len(content):
            yield shorter
            content = shorter


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(kind, chunk with its length and checksum) of each chunk; the last may be cut off."""
    position = len(SIGNATURE)
    while position < len(content):
        end = position + 12 + int.from_bytes(content[position : position + 4], "big")
        yield content[position + 4 : position + 8], content[position:end]
        position = end


def _orients(kind: bytes, chunk: bytes) -> bool:
    """Whether an undamaged chunk may have an orientation."""
    return (kind == b"eXIf" or chunk[8:].startswith(ORIENTATIONS)) and (
        zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
    )
