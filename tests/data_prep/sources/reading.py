"""The contents of a source and of a shard set, in a form that tests compare with the files of a layout."""

import io
import tarfile
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.config import SourceConfig
from data_prep.images.crops import area_resize
from data_prep.images.decode import Decoder
from data_prep.shards.reader import open_shard_set
from data_prep.sources.base import Source
from data_prep.sources.open import open_source

Expected = dict[bytes, Any]
"""Each image's pixels to its class."""


def opened(kind: str, path: Path, **options: object) -> Source:
    return open_source(SourceConfig(kind=kind, path=str(path), **options))


def found(source: Source, split: str, classes: list[str] | None = None) -> Expected:
    """The contents of the source, in the form of the expected contents; unlabelled images have class None."""
    images = source.splits[split]
    assert images.labels.dtype == np.int32
    assert images.labels.shape == (len(images),)
    pixels = [images.image(index, Decoder()) for index in range(len(images))]
    assert all(one.dtype == np.uint8 and one.shape[2] == 3 for one in pixels)
    classes = source.classes if classes is None else classes
    named = [None if label < 0 else classes[label] for label in images.labels.tolist()]
    answer = dict(zip((one.tobytes() for one in pixels), named, strict=True))
    assert len(answer) == len(pixels)
    return answer


def read(content: bytes | Path) -> bytes:
    """Pixels, by Pillow."""
    image = Image.open(io.BytesIO(content) if isinstance(content, bytes) else content)
    return np.asarray(image.convert("RGB")).tobytes()


def opened_jpeg(content: bytes | Path) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content) if isinstance(content, bytes) else content).convert("RGB"))


def files_in(tar: Path | io.BytesIO) -> Iterable[tuple[str, bytes]]:
    with tarfile.open(tar) if isinstance(tar, Path) else tarfile.open(fileobj=tar) as archive:
        for member in archive:
            file = archive.extractfile(member)
            assert file is not None
            yield member.name, file.read()


def reduced(image: np.ndarray) -> bytes:
    """The center crop, at 8x8."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return area_resize(image[top : top + side, left : left + side], 8).tobytes()


def check_shards(out: Path, splits: dict[str, Expected], classes: list[str]) -> None:
    """Every image is in the set once, with its class, in the split it belongs to (valid is taken off train).

    splits: the pixels of each official split's images, cut and reduced, to their labels. Colors are those of
    the palette that are nearest, which tells the images apart.
    """
    shard_set = open_shard_set(out)
    assert shard_set.classes == classes
    palette = 127.5 * (shard_set.palette.astype(float) + 1)
    stored: dict[str, list[tuple[int, ...]]] = {"train": [], "test": []}
    for name in shard_set.splits:
        tokens, labels = shard_set.split(name).gather(np.arange(shard_set.split(name).images))
        rows = zip(labels.tolist(), tokens.tolist(), strict=True)
        stored["test" if name == "test" else "train"] += [(label, *row) for label, row in rows]
    for name, expected in splits.items():
        wanted = []
        for content, label in expected.items():
            pixels = np.frombuffer(content, np.uint8).reshape(-1, 1, 3).astype(float)
            wanted.append((label, *((pixels - palette) ** 2).sum(-1).argmin(-1).tolist()))
        assert sorted(stored[name]) == sorted(wanted)


def opened_with_peak(kind: str, path: Path) -> tuple[Source, int, int]:
    """The source, and the bytes that opening it took: afterwards, and at the peak."""
    tracemalloc.start()
    try:
        source = opened(kind, path)
        return source, *tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
