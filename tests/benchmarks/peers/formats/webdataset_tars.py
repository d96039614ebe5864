"""webdataset on tars whose records pack 256 images, which it reads faster than tars of single images.

It is used as its documentation says: shards are shuffled, images in a buffer. With a worker, WebLoader hands over large
batches, because each costs milliseconds, and they are divided in the process that trains. It reads the tokens alone: of
labels, which are NumPy scalars in a record, WebLoader would make a tensor in shared memory each. It keeps no state: a
resume reads and drops what was read before. Ranks divide the shards (split_by_node).
"""

import random
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import webdataset as wds

from tests.benchmarks.peers.formats import ours

BUFFER = 1000
HANDED_OVER = 8
"""Batches that a worker hands over at once."""


def write(tokens: np.ndarray, folder: Path) -> None:
    """Our tars are plain webdataset tars."""
    ours.write(tokens, folder)


def _images(folder: Path) -> wds.WebDataset:
    urls = sorted(str(file) for file in folder.glob("train-*.tar"))
    tars = wds.WebDataset(urls, shardshuffle=100, nodesplitter=wds.split_by_node, seed=0)
    images = tars.decode().to_tuple("pixels.npy").unbatched()
    return images.shuffle(BUFFER, rng=random.Random(0))  # without it, no two processes read in the same order


class Loader:
    """A pass skips the batches that were read before, once."""

    def __init__(self, folder: Path, size: int, workers: int, skipped: int) -> None:
        self._images, self._skipped = _images(folder), skipped
        if workers:
            large = self._images.batched(HANDED_OVER * size)
            options = {"batch_size": None, "num_workers": workers, "persistent_workers": True}
            self._images = wds.WebLoader(large, **options).unbatched()
        self._batches = self._images.batched(size, partial=False)

    def __iter__(self) -> Iterator[np.ndarray]:
        skipped, self._skipped = self._skipped, 0
        for (pixels,) in islice(self._batches, skipped, None):
            yield np.asarray(pixels)  # WebLoader makes tensors of them


def loader(folder: Path, size: int, workers: int = 0, state: int | None = None) -> Loader:
    """state: the batches to skip."""
    return Loader(folder, size, workers, state or 0)


def state_of(read_by: Loader, read: int) -> int:
    """The batches read."""
    return read


class Mixture:
    """RandomMix over endless sets; a pass takes the next batches, `count` of them."""

    def __init__(self, folders: list[Path], weights: list[float], size: int, count: int) -> None:
        mixed = wds.RandomMix([_images(folder).repeat() for folder in folders], probs=weights)
        self._batches, self._count = iter(wds.DataPipeline(mixed, wds.batched(size, partial=False))), count

    def __iter__(self) -> Iterator[np.ndarray]:
        for (pixels,) in islice(self._batches, self._count):
            yield pixels


def mixture(folders: list[Path], weights: list[float], size: int, images: int, workers: int) -> Iterable[np.ndarray]:
    """In the process, which is faster than with WebLoader."""
    return Mixture(folders, weights, size, images // size)
