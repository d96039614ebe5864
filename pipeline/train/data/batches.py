"""The order of the images: a pure function of (seed, position), whatever the ranks and restarts.

Position p is the p-th image that the run trains on. It lies in epoch p // N of the split's N images. An epoch
permutes the records, groups them into windows, and permutes the images inside each window, so that reads stay
local. The whole state of the loader is the position, "images seen".
"""

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Protocol

import numpy as np

from data_prep.common.seeding import generator
from data_prep.shards.reader import Split
from pipeline.model.augmentation import Augmentation, Changes
from pipeline.model.masks import Batch

WINDOW_RECORDS = 64
"""Records that are mixed with each other: up to 16,384 images."""
FINGERPRINT_IMAGES = 64
STREAMED = "streamed/"
"""Begins the fingerprint of a stream's order, before the number of its ranks."""


class Order(Protocol):
    """Which images a run reads when; what the run's checkpoints must agree with."""

    def fingerprint(self, position: int) -> str:
        """Tells this order from others, from a position on."""
        ...

    def moved_from(self, recorded: str, position: int) -> str | None:
        """The message for a run with another fingerprint that can resume all the same; None if it can't."""
        ...

    def image_numbers(self, position: int, count: int) -> list[int]:
        """The numbers in file order of the images at positions [position, position + count), as far as known."""
        ...


class Batches(Protocol):
    """A data-parallel rank's share of each batch."""

    def at(self, position: int, global_size: int) -> Batch:
        """This rank's share of the global batch that starts at `position`: global_size / ranks images."""
        ...

    def close(self) -> None:
        """Ends the reading thread."""
        ...


class ImageOrder:
    """Which image stands at which position of an endless stream of shuffled epochs."""

    def __init__(self, record_images: np.ndarray, seed: int, augmentation: Augmentation | None = None) -> None:
        """record_images: images of each record, in file order. augmentation: none by default."""
        self._record_images = record_images.astype(np.int64)
        self._first_image = np.concatenate([[0], np.cumsum(self._record_images)])
        self._seed = seed
        self.augmentation = augmentation or Augmentation()
        self.images = int(self._first_image[-1])
        self._epoch = lru_cache(maxsize=2)(self._new_epoch)
        self._window = lru_cache(maxsize=3)(self._new_window)

    def at(self, position: int, count: int) -> tuple[np.ndarray, Changes]:
        """Images at positions [position, position + count): indices in file order int64, and their changes."""
        indices, changes = [], []
        while count:
            epoch, place = divmod(position, self.images)
            _, window_starts = self._epoch(epoch)
            window = int(np.searchsorted(window_starts, place, side="right")) - 1
            images, drawn = self._window(epoch, window)
            offset = place - int(window_starts[window])
            taken = min(count, len(images) - offset)
            indices.append(images[offset : offset + taken])
            changes.append(drawn[offset : offset + taken])
            position, count = position + taken, count - taken
        return np.concatenate(indices), Changes.join(changes)

    def fingerprint(self, position: int) -> str:
        """Digest of the next few images; a change of the generator's algorithm would change it."""
        indices, changes = self.at(position, FINGERPRINT_IMAGES)
        return hashlib.sha256(indices.tobytes() + self.augmentation.bytes_of(changes)).hexdigest()[:16]

    def image_numbers(self, position: int, count: int) -> list[int]:
        """Their numbers in file order."""
        return [int(number) for number in self.at(position, count)[0]]

    def moved_from(self, recorded: str, position: int) -> str | None:
        """The message for a run that was streamed so far; None for one that read by index in another order."""
        if not recorded.startswith(STREAMED):
            return None
        return (
            "the run was streamed so far and is read by index now; from here to the end of the epoch some images "
            "are read again and others left out"
        )

    def _new_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Records in their order of this epoch, and the place in the epoch at which each window starts."""
        records = generator(self._seed, "records", epoch).permutation(len(self._record_images))
        return records, window_starts(self._record_images[records])

    def _new_window(self, epoch: int, window: int) -> tuple[np.ndarray, Changes]:
        """Shuffled images of one window, and what is done to them."""
        records = self._epoch(epoch)[0][window * WINDOW_RECORDS : (window + 1) * WINDOW_RECORDS]
        images = np.concatenate([np.arange(self._first_image[r], self._first_image[r + 1]) for r in records])
        draw = generator(self._seed, "window", epoch, window)
        shuffled = draw.permutation(images)
        return shuffled, self.augmentation.draw(draw, len(images))


def window_starts(record_images: np.ndarray) -> np.ndarray:
    """Of records with so many images each, in the order they are read: the place at which each window starts."""
    ends = np.cumsum(record_images)
    return np.concatenate([[0], ends[WINDOW_RECORDS - 1 : -1 : WINDOW_RECORDS]])


class TrainingBatches:
    """A data-parallel rank's slices of the global batches, read one ahead of the step that needs them."""

    def __init__(self, split: Split, resolution: int, order: ImageOrder, rank: int, ranks: int) -> None:
        self._split, self._resolution, self._order = split, resolution, order
        self._rank, self._ranks = rank, ranks
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._ahead: tuple[tuple[int, int], Future[Batch]] | None = None

    def at(self, position: int, global_size: int) -> Batch:
        """This rank's share of the global batch that starts at `position`: global_size / ranks images."""
        wanted = (position, global_size)
        is_ahead = self._ahead is not None and self._ahead[0] == wanted
        batch = self._ahead[1].result() if self._ahead and is_ahead else self._read(*wanted)
        following = (position + global_size, global_size)
        self._ahead = (following, self._reader.submit(self._read, *following))
        return batch

    def close(self) -> None:
        """Ends the reading thread."""
        self._reader.shutdown(wait=True, cancel_futures=True)

    def _read(self, position: int, global_size: int) -> Batch:
        share = global_size // self._ranks
        indices, changes = self._order.at(position + self._rank * share, share)
        tokens, _ = self._split.gather(indices)
        return Batch(self._order.augmentation.apply(tokens, changes, self._resolution))
