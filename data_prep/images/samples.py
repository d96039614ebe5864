"""Samples of every type to 8 bits. data_prep/README.md has the rule ("Image files")."""

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.images.metadata import lost_tags

if TYPE_CHECKING:
    import PIL.Image

BITS, COMPRESSION, PHOTOMETRIC, SAMPLES, PLANES, TYPE = 258, 259, 262, 277, 284, 339
"""Tags of a TIFF."""
WHITE_IS_ZERO, SEPARATE = 0, 2
"""Values of PHOTOMETRIC and of PLANES."""
SIGNED = 2
LOST = "its directory is truncated or damaged"
TYPES = {1: "unsigned", SIGNED: "signed", 3: "float", 5: "complex", 6: "complex"}
"""Values of TYPE. A file without the tag has unsigned samples."""


class UnsupportedSamples(ValueError):
    """Samples that can't become 8 bits by the rule."""


def check_supported(image: "PIL.Image.Image", content: bytes) -> None:
    """Checks an opened image that Pillow might decode to other values than it has.

    Raises UnsupportedSamples, or OSError for a TIFF whose directory is damaged.
    """
    tags = _tags(image)
    if tags and lost_tags(content, tags):
        raise OSError(LOST)
    stored, mode = image.info.get("compression") == "raw", image.mode
    if stored and tags.get(PLANES) == SEPARATE and max(tags.get(BITS, (1,))) > 8:
        raise UnsupportedSamples(f"{_description(tags)}, in separate planes")
    if not stored and mode in ("I", "F") and tags and tags.prefix == b"MM":
        raise UnsupportedSamples(f"{_description(tags)}, big-endian")


def to_rgb(image: "PIL.Image.Image") -> np.ndarray:
    """uint8 (H, W, 3) of a loaded image. Raises UnsupportedSamples."""
    tags = _tags(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        gray = np.asarray(image) >> (tags.get(BITS, (16,))[0] - 8)
    elif image.mode in ("I", "F"):
        gray = _within_bytes(np.asarray(image))
    elif image.mode == "L" and tags.get(TYPE, (1,))[0] == SIGNED:
        gray = _within_bytes(np.asarray(image).view(np.int8))
    else:
        image = image.convert("LA") if image.mode == "La" else image  # Pillow can't convert La to RGB
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    gray = gray.astype(np.uint8)
    if image.mode != "L" and tags and tags.get(PHOTOMETRIC, WHITE_IS_ZERO) == WHITE_IS_ZERO:
        gray = 255 - gray  # Pillow does so for up to 8 bits only
    return np.repeat(gray[:, :, None], 3, axis=2)


def _within_bytes(values: np.ndarray) -> np.ndarray:
    """Values (H, W) that have no full range of their own, as 0 to 255."""
    low, high = values.min(), values.max()
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        return np.rint(values * np.float32(255))
    if low >= 0 and high <= 255:
        return values
    kind, also = ("float", ", or 0 to 1") if values.dtype.kind == "f" else ("signed or 32-bit", "")
    raise UnsupportedSamples(f"{kind} samples from {low:g} to {high:g}; they must be 0 to 255{also}")


def _tags(image: "PIL.Image.Image") -> Any:
    """The tags of a TIFF; of other formats, none."""
    return getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}


def tiff_description(content: bytes) -> str:
    """The samples of a TIFF that Pillow can't open. Raises any exception if its directory is damaged."""
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    big = content[2:3] == b"+" or content[3:4] == b"+"
    tags = ImageFileDirectory_v2(content[: 16 if big else 8])
    file = io.BytesIO(content)
    file.seek(tags.next)
    tags.load(file)
    if lost_tags(content, tags):
        raise OSError(LOST)
    return _description(tags)


def _description(tags: Any) -> str:
    bits, kind = max(tags.get(BITS, (1,))), tags.get(TYPE, (1,))[0]
    samples = tags.get(SAMPLES, 1)
    return (
        f"a TIFF with {f'{samples} x ' if samples > 1 else ''}{bits} bits a pixel, {TYPES.get(kind, f'type {kind}')}, "
        f"photometric {tags.get(PHOTOMETRIC)}, compression {tags.get(COMPRESSION, 1)}"
    )
