"""Encoded pictures to RGB: simplejpeg where it gives what Pillow would, Pillow for everything else."""

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np

Reason = Literal["not a picture", "truncated", "damaged", "too large", "empty", "unreadable", "damaged tar"]
"""Why something was skipped. unreadable: its bytes could not be had; damaged tar: all after this place is lost."""

MAX_PIXELS = 178_956_970
"""Where Pillow takes a picture for a decompression bomb and refuses it."""
JPEG_MAGIC = b"\xff\xd8\xff"
EXIF_MAGIC = b"Exif\0\0"
EXIF_WITHIN = 1 << 16
"""Bytes from a JPEG's beginning in which an Exif segment may start."""
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
    """Above 0: JPEGs are decoded at the smallest of the scales 1/1, 1/2, 1/4, 1/8 that leaves the shorter side
    at least so many pixels."""

    def __call__(self, content: bytes, name: str) -> np.ndarray:
        if not content:
            raise BadPicture(name, "empty", "0 bytes")
        if content.startswith(JPEG_MAGIC):
            picture = self._jpeg(content)
            if picture is not None:
                return picture
        return _by_pillow(content, name)

    def _jpeg(self, content: bytes) -> np.ndarray | None:
        """A faultless RGB or grey JPEG; None leaves it to Pillow."""
        import simplejpeg

        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(content)
            if colorspace in ("CMYK", "YCCK") or height * width > MAX_PIXELS:
                return None
            smallest = {}
            if self.smallest_side:
                smallest = {"min_height": self.smallest_side, "min_width": self.smallest_side}
            picture = simplejpeg.decode_jpeg(content, "RGB", **smallest)
        except ValueError:
            return None
        return _turned(picture, jpeg_orientation(content))


def jpeg_orientation(content: bytes) -> int:
    """The orientation, 1 to 8, that a JPEG's Exif segment names; 1 where it names none."""
    if content.find(EXIF_MAGIC, 0, EXIF_WITHIN) < 0:
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
            with Image.open(io.BytesIO(content)) as image:
                image.load()
                with suppress(Exception):  # a damaged EXIF block does not spoil the picture
                    ImageOps.exif_transpose(image, in_place=True)
                if image.mode.startswith("I;16"):
                    return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
                return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except UnidentifiedImageError as error:
        raise BadPicture(name, "not a picture", "no format that Pillow knows") from error
    except Image.DecompressionBombError as error:
        raise BadPicture(name, "too large", str(error)) from error
    except MemoryError as error:
        raise BadPicture(name, "too large", "it does not fit in memory") from error
    except (EOFError, struct.error, zlib.error) as error:
        raise BadPicture(name, "truncated", str(error)) from error
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
        detail = str(error) or type(error).__name__
        raise BadPicture(name, "truncated" if "truncated" in detail else "damaged", detail) from error
