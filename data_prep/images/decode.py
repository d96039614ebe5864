"""Encoded pictures to RGB: simplejpeg where it gives what Pillow would, Pillow for everything else."""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import PIL.Image

Reason = Literal["not a picture", "truncated", "damaged", "too large", "empty", "unreadable", "damaged tar"]
"""Why something was skipped. unreadable: its bytes could not be had; damaged tar: all after this place is lost."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
"""What Pillow is asked for. Not among them: formats without a signature, which noise can pass for, and EPS, which
Pillow hands to Ghostscript to run."""
JPEG_MAGIC = b"\xff\xd8\xff"
END_MARKS = {JPEG_MAGIC: b"\xff\xd9", b"\x89PNG\r\n": b"IEND", b"GIF8": b";"}
"""How files begin: what a whole one has at its end."""
END_WITHIN = 64
"""Bytes from a file's end in which the mark may stand: some writers add a few."""
TIFF_ORDERS: dict[bytes, Literal["little", "big"]] = {b"II*\0": "little", b"MM\0*": "big"}
MAX_PIXELS = 178_956_970
"""Where Pillow takes a picture for a decompression bomb and refuses it."""
MAX_SCANNED = 16 * MAX_PIXELS
"""Pixels of a progressive JPEG times its scans, of which ten are usual: each scan costs a walk over all pixels."""
SCALES = (8, 4, 2)
"""What a JPEG's sides may be divided by as it is decoded. libjpeg-turbo offers others, but they take longer."""
SHORT = 4_096
"""Bytes of a JPEG up to which a search is quicker than a walk over its segments."""
START_OF_SCAN, APP1, PROGRESSIVE = 0xDA, 0xE1, (0xC2, 0xCA)
"""JPEG markers; PROGRESSIVE are those of frames with Huffman and with arithmetic codes."""
SCAN = bytes([0xFF, START_OF_SCAN])
SMALLEST_SCAN = 10
"""Bytes of a scan that has nothing but its header."""
EXIF_MAGIC = b"Exif\0\0"
XMP_ORIENTATION = b"tiff:Orientation"
ORIENTATION = 0x0112


class BadImage(ValueError):
    """A picture that can't be used."""

    def __init__(self, name: str, reason: Reason, detail: str = "") -> None:
        self.name, self.reason, self.detail = name, reason, " ".join(detail.split())
        super().__init__(f"{name} is {reason}{f' ({self.detail})' if self.detail else ''}")

    def __reduce__(self) -> tuple[type["BadImage"], tuple[str, Reason, str]]:
        return BadImage, (self.name, self.reason, self.detail)


Decode = Callable[[bytes, str], np.ndarray]
"""Encoded bytes and a name for messages to uint8 (H, W, 3), RGB. Raises BadImage."""


@dataclass(frozen=True)
class Decoder:
    """Decodes pictures; calling it is a `Decode`.

    Turned upright by its EXIF orientation, then Pillow's `convert("RGB")`: CMYK, palettes and grey become RGB,
    transparency is dropped, the first frame of several counts. 16-bit grey keeps its upper eight bits, where
    Pillow would clip all but the darkest greys to white.
    """

    smallest_side: int = 0
    """Above 0: JPEGs are decoded at the smallest of SCALES that leaves the shorter side at least so many pixels."""

    def __call__(self, content: bytes, name: str) -> np.ndarray:
        if not content:
            raise BadImage(name, "empty", "0 bytes")
        if content.startswith(JPEG_MAGIC):
            picture = self._jpeg(content, name)
            if picture is not None:
                return picture
        return _by_pillow(content, name)

    def _jpeg(self, content: bytes, name: str) -> np.ndarray | None:
        """A faultless RGB or grey JPEG; None leaves it to Pillow."""
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
            picture = simplejpeg.decode_jpeg(content, "RGB", **self._smallest(height, width))
        except (ValueError, MemoryError):
            return None
        return _turned(picture, jpeg_orientation(content))

    def _smallest(self, height: int, width: int) -> dict[str, int]:
        """What to ask of simplejpeg for a JPEG of that size; nothing where it is to be decoded whole."""
        for scale in SCALES if self.smallest_side else ():
            sides = {"min_height": -(-height // scale), "min_width": -(-width // scale)}
            if min(sides.values()) >= self.smallest_side:
                return sides
        return {}


def _check_scans(content: bytes, name: str, height: int, width: int) -> None:
    scans = content.count(SCAN)
    if scans * height * width > MAX_SCANNED and any(marker in PROGRESSIVE for marker, _ in jpeg_segments(content)):
        raise BadImage(name, "too large", f"{scans:,} scans of {width}x{height} pixels")


def jpeg_segments(content: bytes) -> Iterator[tuple[int, bytes]]:
    """A JPEG's segments before its first scan, as far as they are whole: marker and what is in them."""
    place = 2
    while place + 4 <= len(content) and content[place] == 0xFF:
        marker = content[place + 1]
        if marker == 0xFF:  # markers may be padded
            place += 1
            continue
        end = place + 2 + int.from_bytes(content[place + 2 : place + 4], "big")
        if marker == START_OF_SCAN or end > len(content):
            return
        yield marker, content[place + 4 : end]
        place = end


def jpeg_orientation(content: bytes) -> int:
    """The orientation, 1 to 8, that a JPEG's Exif or XMP segment names; 1 where neither does."""
    if len(content) <= SHORT and EXIF_MAGIC not in content and XMP_ORIENTATION not in content:
        return 1
    told = (part for marker, part in jpeg_segments(content) if marker == APP1)
    if not any(part.startswith(EXIF_MAGIC) or XMP_ORIENTATION in part for part in told):
        return 1
    with suppress(Exception), _opened(content) as image:  # a damaged Exif block does not spoil the picture
        return int(image.getexif().get(ORIENTATION, 1))
    return 1


def _turned(picture: np.ndarray, orientation: int) -> np.ndarray:
    """uint8 (H, W, 3) upright, as `PIL.ImageOps.exif_transpose` does."""
    if orientation in (5, 6, 7, 8):
        picture = picture.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        picture = picture[:, ::-1]
    if orientation in (3, 4, 7, 8):
        picture = picture[::-1]
    return picture


@contextmanager
def _opened(content: bytes) -> Iterator["PIL.Image.Image"]:
    """Opens a picture with Pillow, quietly: what matters it raises."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            yield image


def _by_pillow(content: bytes, name: str) -> np.ndarray:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with _opened(content) as image:
            image.load()
            with suppress(Exception):  # a damaged Exif block does not spoil the picture
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
                return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except UnidentifiedImageError as error:
        reason = _without_header(content)
        detail = f"none of {', '.join(FORMATS)}" if reason == "not a picture" else "its header can't be read"
        raise BadImage(name, reason, detail) from error
    except Image.DecompressionBombError as error:
        raise BadImage(name, "too large", str(error)) from error
    except MemoryError as error:
        raise BadImage(name, "too large", "it does not fit in memory") from error
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
        detail = str(error) or type(error).__name__
        if "Decompressed data too large" in detail:  # a text or a colour profile within a PNG
            raise BadImage(name, "too large", detail) from error
        said = any(word in detail for word in ("truncated", "Truncated", "EOF", "not enough image data"))
        raise BadImage(name, "truncated" if said or _cut_short(content) else "damaged", detail) from error


def _without_header(content: bytes) -> Reason:
    """What is wrong with a file that Pillow takes for none of the formats."""
    if _cut_short(content):
        return "truncated"
    known = content.startswith((*END_MARKS, *TIFF_ORDERS)) or _is_webp(content) or _is_boxed(content)
    return "damaged" if known else "not a picture"


def _cut_short(content: bytes) -> bool:
    """Whether a file that can't be decoded lacks its end, by what its format says of lengths and ends."""
    for magic, mark in END_MARKS.items():
        if content.startswith(magic):
            return mark not in content[-END_WITHIN:]
    if _is_webp(content):
        return int.from_bytes(content[4:8], "little") + 8 > len(content)
    for magic, order in TIFF_ORDERS.items():
        if content.startswith(magic):  # the directory of its pictures is mostly at its end
            return int.from_bytes(content[4:8], order) + 2 > len(content)
    return _is_boxed(content) and _end_of_boxes(content) > len(content)


def _is_webp(content: bytes) -> bool:
    return content.startswith(b"RIFF") and b"WEBP".startswith(content[8:12])


def _is_boxed(content: bytes) -> bool:
    """Whether it begins as AVIF or JPEG 2000 do."""
    return content[4:12] in (b"ftypavif", b"ftypavis", b"jP  \r\n\x87\n")


def _end_of_boxes(content: bytes) -> int:
    """Where the boxes of an ISO media file end, by their own lengths."""
    place = 0
    while place + 8 <= len(content):
        length = int.from_bytes(content[place : place + 4], "big")
        if length < 8:  # 0: to the file's end; 1: longer than four bytes can say
            return len(content)
        place += length
    return place if place >= len(content) else len(content) + 1
