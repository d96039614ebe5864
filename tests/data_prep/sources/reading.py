"""What a source and a shard set hold, in a form that tests compare with the files of a layout."""

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
"""Each picture's pixels to its class."""


def opened(kind: str, path: Path, **options: object) -> Source:
    return open_source(SourceConfig(kind=kind, path=str(path), **options))


def found(source: Source, split: str, classes: list[str] | None = None) -> Expected:
    """What the source says, in the form of what is expected; unlabelled pictures have class None."""
    pictures = source.splits[split]
    assert pictures.labels.dtype == np.int32
    assert pictures.labels.shape == (len(pictures),)
    pixels = [pictures.image(index, Decoder()) for index in range(len(pictures))]
    assert all(one.dtype == np.uint8 and one.shape[2] == 3 for one in pixels)
    classes = source.classes if classes is None else classes
    named = [None if label < 0 else classes[label] for label in pictures.labels.tolist()]
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


def reduced(picture: np.ndarray) -> bytes:
    """The largest centred square, at 8x8."""
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return area_resize(picture[top : top + side, left : left + side], 8).tobytes()


def check_shards(out: Path, splits: dict[str, Expected], classes: list[str]) -> None:
    """Every picture is in the set once, with its class, in the split it belongs to (valid is taken off train).

    splits: the pixels of each official split's pictures, cut and reduced, to their labels. Colours are those of
    the palette that are nearest, which tells the pictures apart.
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
    """The source, and the bytes that opening it took: kept, and at most."""
    tracemalloc.start()
    try:
        source = opened(kind, path)
        return source, *tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
