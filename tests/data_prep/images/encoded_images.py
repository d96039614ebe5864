"""Encoded images for several tests, in part without Pillow, and Pillow's decoding of them: the reference."""

import io
import struct
import warnings
import zlib

import numpy as np
from PIL import Image, ImageOps

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
ORIENTATION = 0x0112


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def by_pillow(content: bytes) -> np.ndarray:
    """uint8 (H, W, 3), as Pillow alone reads a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(content)) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def chunk(kind: bytes, content: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, pixels: bytes, *, bits: int = 8, color: int = 2, before: bytes = b"") -> bytes:
    """A PNG of raw scan lines: color is 0 gray, 2 RGB, 3 palette; `before` are chunks ahead of the pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    return PNG_SIGNATURE + header + before + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def tiff(
    pixels: np.ndarray | bytes,
    bits: int,
    samples: int = 1,
    *,
    kind: int = 1,
    photometric: int = 1,
    compression: int = 1,
    planes: int = 1,
    order: str = "<",
    size: int = 16,
) -> bytes:
    """A TIFF of `size` x `size` pixels in one strip for each plane: kind is 1 unsigned, 2 signed, 3 float."""
    strips = pixels if isinstance(pixels, bytes) else pixels.tobytes()
    length = len(strips) // (samples if planes == 2 else 1)
    parts = [strips[start : start + length] for start in range(0, len(strips), length)]
    parts = [zlib.compress(part) for part in parts] if compression == 8 else parts
    starts = [8 + sum(map(len, parts[:number])) for number in range(len(parts))]
    tags = {256: [size], 257: [size], 258: samples * [bits], 259: [compression], 262: [photometric], 273: starts}
    tags |= {277: [samples], 278: [size], 279: [len(part) for part in parts], 284: [planes], 339: samples * [kind]}
    body, first = b"".join(parts), 8 + sum(map(len, parts))
    first += first % 2
    entries, values, place = b"", b"", first + 2 + 12 * len(tags) + 4
    for tag, numbers in tags.items():
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        value = packed if len(packed) == 4 else struct.pack(f"{order}I", place + len(values))
        values += packed if len(packed) > 4 else b""
        entries += struct.pack(f"{order}HHI", tag, 4, len(numbers)) + value
    header = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", first)
    directory = struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
    return (header + body).ljust(first, b"\0") + directory + values
