"""Layouts that the fixtures and tests write."""

import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.shards.format import Record
from data_prep.shards.writer import open_shard

CLASSES = ["astronaut", "cat", "coffee"]


def write_folder(root: Path, pixels: np.ndarray, labels: np.ndarray) -> None:
    """Images uint8 (N, H, W, 3) as root/<class>/<number>.png."""
    for index, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        folder = root / CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{index:03d}.png")


def planes(pixels: np.ndarray) -> np.ndarray:
    """CIFAR's order: all of red, all of green, all of blue. (N, 32, 32, 3) to (N, 3072)."""
    return pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)


def archive_of(folder: Path) -> Path:
    """The folder as .tar.gz next to it."""
    archive = folder.with_suffix(".tar.gz")
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    return archive


def write_shard(path: Path, records: Iterable[Record]) -> dict[str, Any]:
    """Writes one tar and returns its entry in the manifest."""
    with open_shard(path) as writer:
        for record in records:
            writer.add(record)
    return writer.entry
