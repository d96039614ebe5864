"""Encoded pictures to RGB: simplejpeg where it gives what Pillow would, Pillow for everything else."""

import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np

Reason = Literal["not a picture", "truncated", "damaged", "too large", "empty", "unreadable", "damaged tar"]
"""Why something was skipped. unreadable: its bytes could not be had; damaged tar: all after this place is lost."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
"""What Pillow is asked for. Not among them: formats without a signature, which noise can pass for, and EPS, which
Pillow hands to Ghostscript to run."""
MAGICS = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"RIFF", b"GIF8", b"II*\0", b"MM\0*")
"""How files begin that are pictures, or were."""
SHORTEST_HEADER = 32
"""Bytes that the shortest whole header takes."""
ENDINGS = {b"\xff\xd8\xff": b"\xff\xd9", b"\x89PNG\r\n": b"IEND"}
"""By signature: what the last bytes of a whole file hold."""
MAX_PIXELS = 178_956_970
"""Where Pillow takes a picture for a decompression bomb and refuses it."""
MAX_SCANNED = 16 * MAX_PIXELS
"""Pixels of a progressive JPEG times its scans, of which ten are usual: each scan costs a walk over all pixels."""
JPEG_MAGIC = b"\xff\xd8\xff"
START_OF_SCAN, APP1, PROGRESSIVE = 0xDA, 0xE1, (0xC2, 0xCA)
"""JPEG markers; PROGRESSIVE are those of frames with Huffman and with arithmetic codes."""
EXIF_MAGIC = b"Exif\0\0"
XMP_ORIENTATION = b"tiff:Orientation"
ORIENTATION = 0x0112


class BadPicture(ValueError):
    """A picture that can't be used."""

    def __init__(self, name: str, reason: Reason, detail: str = "") -> None:
        self.name, self.reason, self.detail = name, reason, " ".join(detail.split())
        super().__init__(f"{name} is {reason}{f' ({self.detail})' if self.detail else ''}")

    def __reduce__(self) -> tuple[type["BadPicture"], tuple[str, Reason, str]]:
        return BadPicture, (self.name, self.reason, self.detail)


Decode = Callable[[bytes, str], np.ndarray]
"""Encoded bytes and a name for messages to uint8 (H, W, 3), RGB. Raises BadPicture."""


@dataclass(frozen=True)
class Decoder:
    """Decodes pictures; calling it is a `Decode`.

    Turned upright by its EXIF orientation, then Pillow's `convert("RGB")`: CMYK, palettes and grey become RGB,
    transparency is dropped, the first frame of several counts. 16-bit grey keeps its upper eight bits, where
    Pillow would clip all but the darkest greys to white.
    """

    smallest_side: int = 0
    """Above 0: JPEGs are decoded at the smallest of the scales 1, 1/2, 3/8, 1/4, 1/8 that leaves the shorter side
    at least so many pixels. (Scales between 1/2 and 1 take longer than the whole picture does.)"""

    def __call__(self, content: bytes, name: str) -> np.ndarray:
        if not content:
            raise BadPicture(name, "empty", "0 bytes")
        if content.startswith(JPEG_MAGIC):
            picture = self._jpeg(content, name)
            if picture is not None:
                return picture
        return _by_pillow(content, name)

    def _jpeg(self, content: bytes, name: str) -> np.ndarray | None:
        """A faultless RGB or grey JPEG; None leaves it to Pillow."""
        import simplejpeg

        segments = list(jpeg_segments(content))
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(content)
            if any(marker in PROGRESSIVE for marker, _ in segments):
                scans = content.count(bytes([0xFF, START_OF_SCAN]))
                if scans * height * width > MAX_SCANNED:
                    raise BadPicture(name, "too large", f"{scans:,} scans of {width}x{height} pixels")
            if colorspace in ("CMYK", "YCCK") or height * width > MAX_PIXELS:
                return None
            smallest = {}
            if self.smallest_side:
                smallest = {"min_height": self.smallest_side, "min_width": self.smallest_side, "min_factor": 2}
            picture = simplejpeg.decode_jpeg(content, "RGB", **smallest)
        except BadPicture:
            raise
        except (ValueError, MemoryError):
            return None
        return _turned(picture, jpeg_orientation(content, segments))


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


def jpeg_orientation(content: bytes, segments: Iterable[tuple[int, bytes]]) -> int:
    """The orientation, 1 to 8, that a JPEG's Exif or XMP segment names; 1 where neither does."""
    told = (part for marker, part in segments if marker == APP1)
    if not any(part.startswith(EXIF_MAGIC) or XMP_ORIENTATION in part for part in told):
        return 1
    from PIL import Image

    with suppress(Exception), Image.open(io.BytesIO(content)) as image:  # damaged Exif does not spoil the picture
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


def _by_pillow(content: bytes, name: str) -> np.ndarray:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                image.load()
                with suppress(Exception):  # a damaged EXIF block does not spoil the picture
                    ImageOps.exif_transpose(image, in_place=True)
                if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
                    return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
                return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except UnidentifiedImageError as error:
        if _cut_short(content):
            raise BadPicture(name, "truncated", "it is shorter than its header says") from error
        if content.startswith(MAGICS):
            raise BadPicture(name, "damaged", "its header can't be read") from error
        raise BadPicture(name, "not a picture", f"none of {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise BadPicture(name, "too large", str(error)) from error
    except MemoryError as error:
        raise BadPicture(name, "too large", "it does not fit in memory") from error
    except (EOFError, struct.error, zlib.error) as error:
        raise BadPicture(name, "truncated", str(error)) from error
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
        detail = str(error) or type(error).__name__
        raise BadPicture(name, _reason(content, detail), detail) from error


def _cut_short(content: bytes) -> bool:
    """Whether a file that has a picture's signature, or the beginning of one, ends before its header does."""
    return len(content) < SHORTEST_HEADER and any(
        content.startswith(magic) or magic.startswith(content) for magic in MAGICS
    )


def _reason(content: bytes, detail: str) -> Reason:
    """Truncated, if the decoder says so or a JPEG or PNG lacks its end; damaged otherwise."""
    said = any(word in detail.lower() for word in ("truncated", "not enough data", "end of file", "unexpected end"))
    ending = next((end for magic, end in ENDINGS.items() if content.startswith(magic)), None)
    return "truncated" if said or (ending is not None and ending not in content[-64:]) else "damaged"
