"""A file of tokens in raster order, mapped into memory: what a careful hand would write, and the floor of the cost."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

FILE = "tokens.npy"


def write(tokens: np.ndarray, folder: Path) -> None:
    """One file."""
    folder.mkdir(parents=True)
    np.save(folder / FILE, tokens)


class Loader:
    """Batches at the places of a permutation of each epoch."""

    def __init__(self, folder: Path, size: int, batch: int) -> None:
        """batch: batches that were read before in the first epoch."""
        self._tokens = np.load(folder / FILE, mmap_mode="r")
        self._size, self._batch, self._epoch = size, batch, 0
        self._rank, self._ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    def __iter__(self) -> Iterator[np.ndarray]:
        order = np.random.default_rng(self._epoch).permutation(len(self._tokens))
        whole = self._size * self._ranks
        for first in range(self._batch * whole, len(order) - whole + 1, whole):
            own = first + self._rank * self._size
            yield self._tokens[order[own : own + self._size]]
        self._epoch, self._batch = self._epoch + 1, 0


def loader(folder: Path, size: int, workers: int = 0, state: int | None = None) -> Loader:
    """It reads in the process."""
    return Loader(folder, size, state or 0)


def state_of(read_by: Loader, read: int) -> int:
    """The batches read."""
    return read


class Mixture:
    """Each image's set is drawn at random; each pass begins both sets in a new order."""

    def __init__(self, sets: list[np.ndarray], weights: list[float], size: int, count: int) -> None:
        self._sets, self._weights, self._size, self._count = sets, weights, size, count
        self._draw = np.random.default_rng(0)

    def __iter__(self) -> Iterator[np.ndarray]:
        orders = [self._draw.permutation(len(tokens)) for tokens in self._sets]
        read = [0] * len(self._sets)
        for _ in range(self._count):
            batch = np.empty((self._size, self._sets[0].shape[1]), np.uint16)
            chosen = self._draw.choice(len(self._sets), self._size, p=self._weights)
            for number, (tokens, order) in enumerate(zip(self._sets, orders, strict=True)):
                places = np.flatnonzero(chosen == number)
                own = order[(read[number] + np.arange(len(places))) % len(order)]
                batch[places] = tokens[own]
                read[number] += len(places)
            yield batch


def mixture(folders: list[Path], weights: list[float], size: int, images: int, workers: int) -> Iterable[np.ndarray]:
    """Each image's set is drawn at random."""
    return Mixture([np.load(folder / FILE, mmap_mode="r") for folder in folders], weights, size, images // size)
