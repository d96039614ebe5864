"""Our shard sets, and the readers that training uses."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from data_prep.common.files import write_json
from data_prep.palette.codec import palette_sha256
from data_prep.shards.format import (
    FORMAT,
    IMAGES_PER_RECORD,
    MANIFEST,
    PALETTE,
    RECORDS_PER_SHARD,
    VERSION,
    shard_name,
)
from data_prep.shards.reader import open_shard_set
from data_prep.shards.writer import open_shard
from pipeline.config import BatchConfig, DataConfig, MixtureEntry, ModelConfig, TrainConfig
from pipeline.train.data.batches import ImageOrder, TrainingBatches
from pipeline.train.data.mixture import MixtureBatches, MixtureOrder
from pipeline.train.data.mixture_history import continued
from pipeline.training_set import open_training_sets

COLORS = 512


def write(tokens: np.ndarray, folder: Path) -> None:
    """A shard set whose train split is `tokens`; its valid split is the first image."""
    folder.mkdir(parents=True)
    palette = np.random.default_rng(0).uniform(-1, 1, (COLORS, 3)).astype(np.float32)
    np.save(folder / PALETTE, palette)
    splits = {name: _write_split(name, some, folder) for name, some in (("train", tokens), ("valid", tokens[:1]))}
    manifest = {"format": FORMAT, "version": VERSION, "source": {"name": folder.name}, "classes": ["none"]}
    manifest |= {"resolution": round(tokens.shape[1] ** 0.5), "splits": splits}
    manifest |= {"palette": {"colors": COLORS, "sha256": palette_sha256(palette)}}
    write_json(folder / MANIFEST, manifest)


def _write_split(name: str, tokens: np.ndarray, folder: Path) -> dict[str, object]:
    shards, size = [], IMAGES_PER_RECORD * RECORDS_PER_SHARD
    for number, first in enumerate(range(0, len(tokens), size)):
        with open_shard(folder / shard_name(name, number)) as writer:
            for record in range(first, min(first + size, len(tokens)), IMAGES_PER_RECORD):
                some = tokens[record : min(record + IMAGES_PER_RECORD, first + size)]
                writer.add((some, np.zeros(len(some), np.int32)))
        shards.append(writer.entry)
    return {"images": len(tokens), "shards": shards}


class Loader:
    """TrainingBatches, which reads one batch ahead in a thread."""

    def __init__(self, folder: Path, size: int, position: int) -> None:
        """size: images of a rank's batch. position: images that were read before."""
        rank, self._ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        opened = open_shard_set(folder)
        split = opened.split("train")
        self.size, self.position, self._images = size, position, split.images
        order = ImageOrder(split.record_images, 0)
        self._batches = TrainingBatches(split, opened.resolution, order, rank, self._ranks)

    def __iter__(self) -> Iterator[np.ndarray]:
        """The complete batches that are left of the epoch."""
        whole = self.size * self._ranks
        for _ in range((self._images - self.position % self._images) // whole):
            yield self._batches.at(self.position, whole).tokens
            self.position += whole
        self.position = -(-self.position // self._images) * self._images


def loader(folder: Path, size: int, workers: int = 1, state: int | None = None) -> Loader:
    """Reading in a thread is all there is."""
    return Loader(folder, size, state or 0)


def state_of(read_by: Loader, read: int) -> int:
    """The images seen."""
    return read * read_by.size


class MixtureLoader:
    """MixtureBatches, which reads one batch ahead in a thread; a pass goes on where the last one ended."""

    def __init__(self, batches: MixtureBatches, size: int, count: int) -> None:
        self._batches, self._size, self._count, self._position = batches, size, count, 0

    def __iter__(self) -> Iterator[np.ndarray]:
        for _ in range(self._count):
            yield self._batches.at(self._position, self._size).tokens
            self._position += self._size


def mixture(folders: list[Path], weights: list[float], size: int, images: int, workers: int) -> Iterable[np.ndarray]:
    """MixtureBatches, as training reads it."""
    entries = [MixtureEntry(shards=str(folder), weight=weight) for folder, weight in zip(folders, weights, strict=True)]
    resolution = open_shard_set(folders[0]).resolution
    sets = open_training_sets(
        TrainConfig(
            data=DataConfig(mixture=entries),
            model=ModelConfig(size="s", resolution=resolution),
            batch=BatchConfig(global_size=size, micro_size=size),
        )
    )
    order = MixtureOrder(continued((), sets, 1, 0, 0), sets, 0)
    return MixtureLoader(MixtureBatches(order, resolution, 0, 1), size, images // size)
