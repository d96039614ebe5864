"""Tars of images for tests, made member by member."""

import io
import tarfile
from collections.abc import Iterable

import numpy as np
from PIL import Image

Member = tuple[str, bytes]


def encode_image(pixels: np.ndarray, kind: str = "png") -> bytes:
    """uint8 (H, W, 3), encoded."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def tar_bytes(members: Iterable[Member | tarfile.TarInfo], kind: int = tarfile.USTAR_FORMAT) -> bytes:
    """A complete tar of files, and of members without content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            header = tarfile.TarInfo(member[0])
            header.size = len(member[1])
            tar.addfile(header, io.BytesIO(member[1]))
    return buffer.getvalue()
