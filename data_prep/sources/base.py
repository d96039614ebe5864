"""What a source is: named splits of pictures with labels, and the names of the classes."""

import hashlib
import io
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

UNLABELLED = -1


class Pictures(Protocol):
    """One split: pictures that are decoded when asked for, so that worker processes do it."""

    labels: np.ndarray
    """int32 (N,): the class of each picture, -1 where unlabelled."""

    def __len__(self) -> int: ...

    def picture(self, index: int) -> np.ndarray:
        """uint8 (H, W, 3), RGB. Raises ValueError naming the picture if it can't be read."""
        ...


@dataclass(frozen=True)
class Encoded:
    """A picture as it came off a stream: undecoded bytes, a name for messages, its class."""

    name: str
    content: bytes
    label: int


class PictureStream(Protocol):
    """One split that can only be read from its beginning, and whose length may be unknown."""

    def __iter__(self) -> Iterator[Encoded]: ...


@dataclass(frozen=True)
class Source:
    """An opened source. `splits` has `train` and may have `valid` and `test`."""

    name: str
    classes: list[str]
    """Names by label; empty where the source knows none (a stream with bare numbers, or no labels)."""
    splits: dict[str, Pictures]
    streams: dict[str, PictureStream]
    """Splits that are streams; a split is in one of the two."""
    fingerprint: str
    """Changes when pictures are added, removed or renamed; cheap, so it does not see inside picture files."""
    cropped: bool = False
    """Whether the pictures are random crops already, so that `random_crop: auto` takes them whole."""


class ArrayPictures:
    """Pictures held in memory."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray) -> None:
        """pixels: uint8 (N, H, W, 3); labels: integers (N,)."""
        assert pixels.dtype == np.uint8 and pixels.ndim == 4 and len(pixels) == len(labels)
        self.pixels, self.labels = pixels, labels.astype(np.int32)

    def __len__(self) -> int:
        return len(self.pixels)

    def picture(self, index: int) -> np.ndarray:
        return self.pixels[index]


def fingerprint(parts: Iterable[Any]) -> str:
    """sha256 over the text of `parts`."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def decode_picture(content: bytes, name: str) -> np.ndarray:
    """An encoded picture as uint8 (H, W, 3), RGB.

    Turned upright by its EXIF orientation, then Pillow's `convert("RGB")`: CMYK, palettes and grey become
    RGB, transparency is dropped, the first frame of several counts. 16-bit grey keeps its upper eight bits,
    where Pillow would clip all but the darkest greys to white.

    Raises ValueError naming the picture if it can't be read.
    """
    from PIL import Image, ImageOps

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
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name} is not a readable picture ({reason}); repair or remove it.") from error
