"""The data order of a local shard set: a pure function of (seed, position), independent of ranks and restarts.

Position p is the p-th image that the run trains on, in epoch p // N of the split's N images. An epoch permutes the
records, groups them into windows, and permutes the images inside each window, so that reads stay local. The complete
state of the loader is the position, "images seen".
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
"""Records of a shuffle window: up to 16,384 images."""
FINGERPRINT_IMAGES = 64
"""Images that the fingerprint of an order is computed from."""
STREAMED = "streamed/"
"""Prefix of the fingerprint of a streamed order; the number of ranks follows."""


class Order(Protocol):
    """The order in which a run reads the images; a checkpoint resumes only with its own order."""

    def fingerprint(self, position: int) -> str:
        """A digest that differs between orders, computed from the images after `position`."""
        ...

    def resume_warning(self, recorded: str, position: int) -> str | None:
        """The warning if a run with the fingerprint `recorded` can resume with this order; None if it can't."""
        ...

    def image_numbers(self, position: int, count: int) -> list[int]:
        """Indices of the images at positions [position, position + count): in file order; of a mixture, set by set."""
        ...

    def epochs(self, position: int) -> dict[str, float]:
        """Epochs of each set of a mixture when `position` images are read, by its name; empty for a single set."""
        ...


class Batches(Protocol):
    """A data-parallel rank's share of each batch."""

    def at(self, position: int, global_size: int) -> Batch:
        """This rank's share of the global batch that starts at `position`: global_size / ranks images."""
        ...

    def close(self) -> None:
        """Stops the reading thread."""
        ...


class ImageOrder:
    """Maps positions of an endless sequence of shuffled epochs to images."""

    def __init__(self, record_images: np.ndarray, seed: int, augmentation: Augmentation | None = None) -> None:
        """record_images: number of images in each record, in file order. augmentation: none by default."""
        self._record_images = record_images.astype(np.int64)
        self._first_image = np.concatenate([[0], np.cumsum(self._record_images)])
        self._seed = seed
        self.augmentation = augmentation or Augmentation()
        self.images = int(self._first_image[-1])
        self._epoch = lru_cache(maxsize=2)(self._new_epoch)
        self._window = lru_cache(maxsize=3)(self._new_window)

    def at(self, position: int, count: int) -> tuple[np.ndarray, Changes]:
        """Images at positions [position, position + count): int64 indices in file order, and their augmentations."""
        indices, changes = [], []
        while count:
            epoch, in_epoch = divmod(position, self.images)
            _, window_starts = self._epoch(epoch)
            window = int(np.searchsorted(window_starts, in_epoch, side="right")) - 1
            images, drawn = self._window(epoch, window)
            offset = in_epoch - int(window_starts[window])
            taken = min(count, len(images) - offset)
            indices.append(images[offset : offset + taken])
            changes.append(drawn[offset : offset + taken])
            position, count = position + taken, count - taken
        return np.concatenate(indices), Changes.join(changes)

    def fingerprint(self, position: int) -> str:
        """Digest of the next images; a change of numpy's generator would change it too."""
        indices, changes = self.at(position, FINGERPRINT_IMAGES)
        return hashlib.sha256(indices.tobytes() + self.augmentation.bytes_of(changes)).hexdigest()[:16]

    def image_numbers(self, position: int, count: int) -> list[int]:
        """Their indices in file order."""
        return [int(number) for number in self.at(position, count)[0]]

    def epochs(self, position: int) -> dict[str, float]:
        """Empty: a single set."""
        return {}

    def resume_warning(self, recorded: str, position: int) -> str | None:
        """The warning for a run that was streamed before; None for a run that read by index in another order."""
        if not recorded.startswith(STREAMED):
            return None
        return (
            "the run was streamed before and is read by index now; until the end of the epoch some images are read "
            "twice and others are skipped"
        )

    def _new_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The permuted records of an epoch, and the position in the epoch at which each window starts."""
        records = generator(self._seed, "records", epoch).permutation(len(self._record_images))
        return records, window_starts(self._record_images[records])

    def _new_window(self, epoch: int, window: int) -> tuple[np.ndarray, Changes]:
        """The shuffled images of a window, and their augmentations."""
        records = self._epoch(epoch)[0][window * WINDOW_RECORDS : (window + 1) * WINDOW_RECORDS]
        images = np.concatenate([np.arange(self._first_image[r], self._first_image[r + 1]) for r in records])
        draw = generator(self._seed, "window", epoch, window)
        shuffled = draw.permutation(images)
        return shuffled, self.augmentation.draw(draw, len(images))


def window_starts(record_images: np.ndarray) -> np.ndarray:
    """The position at which each window starts; record_images: images of each record in the order they are read."""
    ends = np.cumsum(record_images)
    return np.concatenate([[0], ends[WINDOW_RECORDS - 1 : -1 : WINDOW_RECORDS]])


class ReadAhead:
    """Reads each batch in a thread, and one batch ahead; a subclass says how."""

    def __init__(self) -> None:
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._ahead: tuple[tuple[int, int], Future[Batch]] | None = None

    def at(self, position: int, global_size: int) -> Batch:
        """This rank's share of the global batch that starts at `position`: global_size / ranks images."""
        wanted = (position, global_size)
        is_ahead = self._ahead is not None and self._ahead[0] == wanted
        reading = self._ahead[1] if self._ahead and is_ahead else self._reader.submit(self._read, *wanted)
        batch = reading.result()
        following = (position + global_size, global_size)
        self._ahead = (following, self._reader.submit(self._read, *following))
        return batch

    def close(self) -> None:
        """Stops the reading thread."""
        self._stop()

    def _stop(self, wait: bool = True) -> None:
        self._reader.shutdown(wait=wait, cancel_futures=True)

    def _read(self, position: int, global_size: int) -> Batch:
        raise NotImplementedError


class TrainingBatches(ReadAhead):
    """Reads a data-parallel rank's share of each batch of a local shard set."""

    def __init__(self, split: Split, resolution: int, order: ImageOrder, rank: int, ranks: int) -> None:
        super().__init__()
        self._split, self._resolution, self._order = split, resolution, order
        self._rank, self._ranks = rank, ranks

    def _read(self, position: int, global_size: int) -> Batch:
        share = global_size // self._ranks
        indices, changes = self._order.at(position + self._rank * share, share)
        tokens = self._split.gather_tokens(indices)
        return Batch(self._order.augmentation.apply(tokens, changes, self._resolution))
