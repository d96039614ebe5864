"""Image files to RGB: simplejpeg where its result equals Pillow's, Pillow for everything else."""

import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from data_prep.common.contents import described_data
from data_prep.images.metadata import APP1, ORIENTATION, START_OF_SCAN, TIFF_ORDERS, jpeg_segments, without_metadata
from data_prep.images.samples import UnsupportedSamples, check_supported, tiff_description, to_rgb

if TYPE_CHECKING:
    import PIL.Image

Reason = Literal[
    "not a picture",
    "unsupported",
    "truncated",
    "damaged",
    "too large",
    "empty",
    "unreadable",
    "damaged tar",
    "near-duplicate",
    "filtered",
    "no value",
]
"""Why something was skipped. unsupported: a form of a known format that can't be decoded; unreadable: its bytes could
not be read; damaged tar: all after this position is lost. The last three are usable images that the options exclude."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
"""Formats that Pillow may open. Excluded: formats without a signature, since random bytes can pass for them, and EPS,
which Pillow passes to Ghostscript to execute."""
JPEG_MAGIC = b"\xff\xd8\xff"
JPEG_END = b"\xff\xd9"
END_MARKS = {JPEG_MAGIC: JPEG_END, b"\x89PNG\r\n": b"IEND", b"GIF8": b";"}
"""First bytes of a file: what a complete file has at its end."""
END_MARK_WINDOW = 64
"""The mark may be this many bytes before the end of the file, since some writers append a few."""
TIFF_MAGIC = (*TIFF_ORDERS, b"II+\0", b"MM\0+")
"""With those of TIFFs that may have more than 4 GB."""
UNSUPPORTED = re.compile(
    r"unknown pixel mode|samples per pixel|cannot handle [1-9]\d*-|[Uu]nsupported|not yet supported"
    r"|string index out of range|^\d+$"  # a TIFF of separate planes that are not colors; its unknown compression
)
"""Matches Pillow's messages about a form of a known format that it can't decode."""
MAX_PIXELS = 178_956_970
"""Pillow rejects larger images as decompression bombs."""
MAX_SCANNED = 16 * MAX_PIXELS
"""Limit of a progressive JPEG's pixels times its scans. Each scan costs a pass over all pixels; ten scans are usual."""
SCALES = (8, 4, 2)
"""Factors by which a JPEG's sides may be divided during decoding. libjpeg-turbo has others, but they are slower."""
SMALL_JPEG = 4_096
"""Up to this many bytes, a search in a JPEG is faster than iterating over its segments."""
PROGRESSIVE = (0xC2, 0xCA)
"""JPEG markers of progressive frames, with Huffman coding and with arithmetic coding."""
SCAN = bytes([0xFF, START_OF_SCAN])
MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
"""A JPEG's markers, except those that restart a scan; within a scan, a byte 0xFF is followed by 0."""
SMALLEST_SCAN = 10
"""Bytes of a scan that has only a header."""
EXIF_MAGIC = b"Exif\0\0"
XMP_ORIENTATION = b"tiff:Orientation"

logging.getLogger("PIL").setLevel(logging.CRITICAL + 1)  # what it logs of a file is in the reason of the skip


class BadImage(ValueError):
    """An image that can't be used, or that the options exclude."""

    def __init__(self, name: str, reason: Reason, detail: str = "") -> None:
        self.name, self.reason, self.detail = name, reason, " ".join(detail.split())
        super().__init__(f"{name} is {reason}{f' ({self.detail})' if self.detail else ''}")

    def __reduce__(self) -> tuple[type["BadImage"], tuple[str, Reason, str]]:
        return BadImage, (self.name, self.reason, self.detail)


Decode = Callable[[bytes, str], np.ndarray]
"""Takes encoded bytes and a name for messages, returns uint8 (H, W, 3), RGB. Raises BadImage."""


@dataclass(frozen=True)
class Decoder:
    """Decodes images; an instance is a `Decode`.

    The EXIF orientation is applied, then Pillow's `convert("RGB")`: CMYK, palettes and gray become RGB, transparency is
    dropped, and only the first frame is used. Samples of other types than 8 bits are scaled by samples.py.
    """

    smallest_side: int = 0
    """Above 0: JPEGs are decoded at the smallest scale (see SCALES) that leaves the shorter side this many pixels."""

    def __call__(self, content: bytes, name: str) -> np.ndarray:
        if not content:
            raise BadImage(name, "empty", "0 bytes")
        if content.startswith(JPEG_MAGIC):
            image = self._jpeg(content, name)
            if image is not None:
                return image
        return _by_pillow(content, name)

    def _jpeg(self, content: bytes, name: str) -> np.ndarray | None:
        """Decodes an undamaged RGB or gray JPEG; None leaves it to Pillow."""
        import simplejpeg

        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(content)
        except ValueError:
            return None
        if len(content) // SMALLEST_SCAN * height * width > MAX_SCANNED:
            _check_scans(content, name, height, width)
        if colorspace in ("CMYK", "YCCK") or height * width > MAX_PIXELS:
            return None
        try:
            image = simplejpeg.decode_jpeg(content, "RGB", **self._smallest(height, width))
        except (ValueError, MemoryError):
            return None
        return _apply_orientation(image, jpeg_orientation(content))

    def _smallest(self, height: int, width: int) -> dict[str, int]:
        """Arguments of simplejpeg for a JPEG of this size; none if it is to be decoded at full size."""
        for scale in SCALES if self.smallest_side else ():
            sides = {"min_height": -(-height // scale), "min_width": -(-width // scale)}
            if min(sides.values()) >= self.smallest_side:
                return sides
        return {}


def _check_scans(content: bytes, name: str, height: int, width: int) -> None:
    if content.count(SCAN) * height * width <= MAX_SCANNED:  # at most: it also finds them in metadata
        return
    if not any(marker in PROGRESSIVE for marker, _, _ in jpeg_segments(content)):
        return
    scans = _count_scans(content)
    if scans * height * width > MAX_SCANNED:
        raise BadImage(name, "too large", f"{scans:,} scans of {width}x{height} pixels")


def _count_scans(content: bytes) -> int:
    """The scans of a JPEG up to its end mark, without those of previews within its metadata."""
    scans, position = 0, 2
    while (found := MARKER.search(content, position)) and found[0] != JPEG_END:
        scans += found[0] == SCAN
        position = found.end() + int.from_bytes(content[found.end() : found.end() + 2], "big")
    return scans


def jpeg_orientation(content: bytes) -> int:
    """The orientation, 1 to 8, from a JPEG's Exif or XMP segment; 1 if neither has it."""
    if len(content) <= SMALL_JPEG and EXIF_MAGIC not in content and XMP_ORIENTATION not in content:
        return 1
    segments = (content[start + 4 : end] for marker, start, end in jpeg_segments(content) if marker == APP1)
    if not any(segment.startswith(EXIF_MAGIC) or XMP_ORIENTATION in segment for segment in segments):
        return 1
    with suppress(Exception), _open_image(content) as image:  # an image with a damaged Exif block is still usable
        return int(image.getexif().get(ORIENTATION, 1))
    return 1


def _apply_orientation(image: np.ndarray, orientation: int) -> np.ndarray:
    """uint8 (H, W, 3), rotated and mirrored like `PIL.ImageOps.exif_transpose`."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return image


@contextmanager
def _open_image(content: bytes) -> Iterator["PIL.Image.Image"]:
    """Opens an image with Pillow, without its warnings; errors are raised."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            yield image


def _by_pillow(content: bytes, name: str) -> np.ndarray:
    try:
        return _pillow_pixels(content)
    except Exception as error:  # Pillow's plugins may raise any exception on damaged files
        bad = _bad_image(content, name, error)
    for pixels_alone in without_metadata(content):
        with suppress(Exception):
            return _pillow_pixels(pixels_alone)
    raise bad


def _pillow_pixels(content: bytes) -> np.ndarray:
    from PIL import ImageOps

    with _open_image(content) as image:
        check_supported(image, content)
        image.load()
        with suppress(Exception):  # an image with a damaged Exif block is still usable
            ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)


def _bad_image(content: bytes, name: str, error: Exception) -> BadImage:
    """The reason for an exception of Pillow's."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, Image.DecompressionBombError):
        return BadImage(name, "too large", str(error))
    if isinstance(error, MemoryError):
        return BadImage(name, "too large", "it does not fit in memory")
    if isinstance(error, UnsupportedSamples):
        return BadImage(name, "unsupported", str(error))
    if isinstance(error, UnidentifiedImageError):
        return _unidentified(content, name)
    detail = str(error) or type(error).__name__
    if UNSUPPORTED.search(detail):
        return BadImage(name, "unsupported", detail)
    reported = any(word in detail for word in ("truncated", "Truncated", "EOF", "not enough image data"))
    return BadImage(name, "truncated" if reported or _is_truncated(content) else "damaged", detail)


def _unidentified(content: bytes, name: str) -> BadImage:
    """The reason for a file that none of Pillow's plugins opened."""
    with warnings.catch_warnings(action="ignore"):
        message = _plugin_message(content)
        if UNSUPPORTED.search(message):
            with suppress(Exception):  # the directory of a TIFF may be damaged
                message = tiff_description(content) if content.startswith(TIFF_MAGIC) else message
                return BadImage(name, "unsupported", message)
    reason = _unidentified_reason(content)
    known = described_data(content)
    unknown = f"it is {known}" if known else f"none of {', '.join(FORMATS)}"
    detail = unknown if reason == "not a picture" else "its header can't be read"
    return BadImage(name, reason, detail)


def _plugin_message(content: bytes) -> str:
    """The error message of the format's plugin, which `Image.open` discards."""
    from PIL import Image

    for factory, accepts in (Image.OPEN[name] for name in FORMATS if name in Image.OPEN):
        if accepts is not None and accepts(content[:16]) is True:
            try:
                factory(io.BytesIO(content), "").close()
            except Exception as error:
                return str(error)
    return ""


def _unidentified_reason(content: bytes) -> Reason:
    """The reason for a file in which Pillow recognizes none of the formats."""
    if _is_truncated(content):
        return "truncated"
    known = content.startswith((*END_MARKS, *TIFF_MAGIC)) or _is_webp(content) or _is_iso_media(content)
    return "damaged" if known else "not a picture"


def is_image(start: bytes) -> bool:
    """Whether the first 16 bytes of a file show that it is an image, whatever its name.

    TIFF is excluded, since cameras' raw files are TIFFs, and so are formats whose signature a text may begin with.
    """
    return start.startswith(tuple(END_MARKS)) or _is_webp(start) or _is_iso_media(start)


def _is_truncated(content: bytes) -> bool:
    """Whether the end of an undecodable file is missing, by the lengths and end marks of its format."""
    for magic, mark in END_MARKS.items():
        if content.startswith(magic):
            return mark not in content[-END_MARK_WINDOW:]
    if _is_webp(content):
        return int.from_bytes(content[4:8], "little") + 8 > len(content)
    for magic, order in TIFF_ORDERS.items():
        if content.startswith(magic):  # the directory of a TIFF is usually at its end
            return int.from_bytes(content[4:8], order) + 2 > len(content)
    return _is_iso_media(content) and _end_of_boxes(content) > len(content)


def _is_webp(content: bytes) -> bool:
    return content.startswith(b"RIFF") and b"WEBP".startswith(content[8:12])


def _is_iso_media(content: bytes) -> bool:
    """Whether it starts like AVIF or JPEG 2000."""
    return content[4:12] in (b"ftypavif", b"ftypavis", b"jP  \r\n\x87\n")


def _end_of_boxes(content: bytes) -> int:
    """The end of the boxes of an ISO media file, by the lengths in their headers."""
    position = 0
    while position + 8 <= len(content):
        length = int.from_bytes(content[position : position + 4], "big")
        if length < 8:  # 0: to the file's end; 1: the length has more than four bytes
            return len(content)
        position += length
    return position if position >= len(content) else len(content) + 1
