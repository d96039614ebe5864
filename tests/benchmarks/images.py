"""The images that are prepared: JPEGs of photographs in folders and tars, or CIFAR-10 as JPEG."""

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.config import SourceConfig
from data_prep.images.decode import Decoder
from data_prep.sources.open import open_source

GRAIN = 26
"""Standard deviation of the noise that makes JPEGs of 500x375 as large as ImageNet's average, 110 KB. The
windows alone are smooth, and decoding time depends on the bytes as much as on the pixels."""
WEB_SIDE, WEB_IMAGES = 256, 300


def photographs(count: int, size: tuple[int, int], grain: float = 0) -> Iterator[tuple[int, bytes]]:
    """JPEGs of `size`, each a window of an embedded photograph, with its class."""
    windows = open_source(SourceConfig(kind="photographs", train_per_class=-(-count // 10))).splits["train"]
    random = np.random.default_rng(0)
    for number in range(count):
        index = number * len(windows) // count
        window = Image.fromarray(windows.image(index, Decoder())).resize(size, Image.Resampling.BICUBIC)
        if grain:
            noisy = np.asarray(window) + random.normal(0, grain, (size[1], size[0], 3))
            window = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        content = io.BytesIO()
        window.save(content, "JPEG", quality=90)
        yield int(windows.labels[index]), content.getvalue()


def write_photographs(folder: Path, count: int, size: tuple[int, int], grain: float = 0) -> int:
    """Writes `photographs` as folder/train/<class>/<number>.jpg; their mean size in bytes."""
    total = 0
    for number, (label, content) in enumerate(photographs(count, size, grain)):
        file = folder / f"train/{label}/{number:06d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        total += file.write_bytes(content)
    return total // count


def write_tars(folder: Path) -> int:
    """A tar of WEB_IMAGES JPEGs of 256x256 with their grain, as img2dataset's; their mean size in bytes."""
    folder.mkdir()
    total = 0
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for number, (_, content) in enumerate(photographs(WEB_IMAGES, (WEB_SIDE, WEB_SIDE), GRAIN)):
            member = tarfile.TarInfo(f"{number:09d}.jpg")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
            total += len(content)
    return total // WEB_IMAGES


def small_images(folder: Path, count: int) -> tuple[str, Path]:
    """CIFAR-10 as JPEG where the environment names its archive, else windows of photographs; and what they are."""
    archive = os.environ.get("CIFAR10_JPEG")
    if archive is None:
        write_photographs(folder, count, (32, 32))
        return "JPEGs of 32x32", folder
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return "images of CIFAR-10 (JPEG copy)", folder
