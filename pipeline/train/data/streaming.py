"""Training on a shard set at an address: each data-parallel rank streams its own part of `train`, through webdataset.

Each shard is read over one connection, which starts at the first record that is needed. Each record is compared with
its checksum as it arrives, because the shards are not verified before the first step.
"""

import tarfile
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import Any

import numpy as np

from data_prep.shards.addresses import hide_secrets
from data_prep.shards.format import LABELS_DTYPE, MANIFEST, PIXELS_DTYPE, TAR_BLOCK, record_crc32
from data_prep.shards.reader import Split
from data_prep.shards.remote import address_of, open_remote
from pipeline.model.masks import Batch
from pipeline.train.data.batches import WINDOW_RECORDS
from pipeline.train.data.mixture_stream import MixtureStream
from pipeline.train.data.stream_order import StreamOrder

GUARANTEES = f"""\
  train is streamed, with weaker guarantees than a local shard set:
    the order depends on the number of data-parallel ranks: with another number a run resumes at the same number of
      images seen, but reads some images of that epoch twice and skips others;
    images are shuffled within windows of {WINDOW_RECORDS} consecutive records; the order of the shards is random;
    shards are not verified before the first step; each record is verified by its checksum as it is read."""
GUARANTEES_IN_MIXTURE = f"""\
  train of some sets is streamed:
    the order of a streamed set depends on the number of data-parallel ranks; if that changes, the ranks divide anew
      what is left of the set's epoch, so that none of its images is read twice or skipped;
    its images are shuffled within windows of {WINDOW_RECORDS} consecutive records; the order of its shards is random;
    its shards are not verified before the first step; each record is verified by its checksum as it is read."""
Key = tuple[int, int]
"""Epoch, and number of the window in the rank's part of that epoch."""


class DamagedRecord(ValueError):
    """A record's content differs from its checksum."""


class StreamedBatches:
    """Streams a data-parallel rank's share of each batch; the next window is read while the current one is used.

    Two windows are in memory: 128 records, 67 MB at 32x32.
    """

    def __init__(self, split: Split, resolution: int, order: StreamOrder | MixtureStream, rank: int) -> None:
        self._split, self._resolution, self._order, self._rank = split, resolution, order, rank
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="stream")
        self._windows: dict[Key, Future[np.ndarray]] = {}
        self._records: Generator[np.ndarray, None, None] | None = None
        self._next_of_records: Key | None = None
        self._closing = Event()

    def at(self, position: int, global_size: int) -> Batch:
        """This rank's share of the batch that starts when all ranks have read `position`.

        A pure function of (seed, position, ranks). Each rank's own position is position / ranks, so global_size may
        change between steps. Raises ValueError or OSError naming what could not be read.
        """
        ranks = self._order.ranks
        return Batch(self.read(position // ranks, global_size // ranks))

    def read(self, position: int, count: int) -> np.ndarray:
        """uint16 (count, T): some images of this rank; position: as of `slices` of the order. Raises as `at`."""
        batch = []
        for key, chosen in self._order.slices(self._rank, position, count):
            window = self._order.window(self._rank, *key)
            images = self._window(key)[window.shuffled[chosen]]
            batch.append(self._order.augmentation.apply(images, window.changes[chosen], self._resolution))
        return np.concatenate(batch)

    def close(self) -> None:
        """Stops the reading thread at its next record, without waiting for a connection that may hang."""
        self._closing.set()
        self._reader.submit(self._end_records)
        self._reader.shutdown(wait=False)

    def _window(self, key: Key) -> np.ndarray:
        """The tokens of a window in read order; also starts to read the next window."""
        wanted = (key, self._order.following(self._rank, *key))
        for other in self._windows.keys() - set(wanted):
            self._windows.pop(other).cancel()
        for one in wanted:
            if one not in self._windows:
                self._windows[one] = self._reader.submit(self._read, one)
        return self._windows[key].result()

    def _read(self, key: Key) -> np.ndarray:
        """In the thread: reads a window, uint16 (n, T). Reuses the open connection if the window comes next on it."""
        if self._records is None or self._next_of_records != key or key[1] == 0:
            self._end_records()
            self._records = self._records_from(key)
        records = self._records
        self._next_of_records = None  # after an error the connection is not used again
        part = self._order.window(self._rank, *key).part
        tokens = np.empty((part.images, self._split.positions), PIXELS_DTYPE)
        filled = 0
        for index, images in enumerate(part.sizes):
            if self._closing.is_set():
                raise ValueError("the batches were closed.")
            tokens[filled : filled + images] = next(records)[part.rows(index)]
            filled += images
        self._next_of_records = self._order.following(self._rank, *key)
        return tokens

    def _end_records(self) -> None:
        if self._records is not None:
            self._records.close()
        self._records = None

    def _records_from(self, key: Key) -> Generator[np.ndarray, None, None]:
        """Complete records, from the first of a window to the end of the rank's part of that epoch."""
        epoch, window = key
        records = self._order.part(self._rank, epoch).records[window * WINDOW_RECORDS :]
        shards = np.searchsorted(self._split.shard_starts, records, side="right") - 1
        for run in np.split(records, np.flatnonzero((np.diff(shards) != 0) | (np.diff(records) != 1)) + 1):
            yield from read_records(self._split, int(run[0]), int(run[-1]) + 1)


def read_records(split: Split, first: int, stop: int) -> Generator[np.ndarray, None, None]:
    """Streams records [first, stop) of one shard of a remote split: uint16 (n, T) each.

    A record that differs from its checksum is read a second time. Raises ValueError naming shard and record if it
    differs again, and the errors of `open_remote`.
    """
    record, tried = first, -1
    while record < stop:
        try:
            for tokens in _stream_once(split, record, stop):
                yield tokens
                record += 1
        except DamagedRecord:
            if tried == record:
                raise
            tried = record


def _stream_once(split: Split, first: int, stop: int) -> Generator[np.ndarray, None, None]:
    """Streams records [first, stop) over one connection. Raises DamagedRecord at the first damaged record."""
    from webdataset.tariterators import tar_file_iterator

    number = int(np.searchsorted(split.shard_starts, first, side="right")) - 1
    shard, before = split.shards[number], int(split.shard_starts[number])
    assert split.address is not None
    address = address_of(split.address, shard["file"])
    with open_remote(address, _end(shard, first - before - 1), size=shard["bytes"]) as file:
        members = tar_file_iterator(file)
        for record in range(first - before, stop - before):
            try:
                pixels, labels = next(members)["data"], next(members)["data"]
            except (tarfile.TarError, StopIteration):
                pixels = labels = b""
            except (OSError, ValueError) as error:  # webdataset appends the file object to the message
                kind = OSError if isinstance(error, OSError) else ValueError
                raise kind(str(error).removesuffix(f" @ {file}")) from error
            tokens = _tokens(pixels, labels, split.positions, shard, record)
            if tokens is None:
                raise DamagedRecord(
                    f"{hide_secrets(address)}, record {record}, is damaged (its checksum differs from {MANIFEST}); "
                    f"restore the file from a copy."
                )
            yield tokens


def _end(shard: dict[str, Any], record: int) -> int:
    """The byte offset of the header that follows a record; 0 for record -1."""
    if record < 0:
        return 0
    end = shard["labels_offsets"][record] + shard["record_images"][record] * LABELS_DTYPE.itemsize
    return -(-end // TAR_BLOCK) * TAR_BLOCK


def _tokens(pixels: bytes, labels: bytes, positions: int, shard: dict[str, Any], record: int) -> np.ndarray | None:
    """uint16 (n, T) from the two .npy files of a record; None if they do not match the manifest."""
    images = shard["record_images"][record]
    wanted = images * positions * PIXELS_DTYPE.itemsize, images * LABELS_DTYPE.itemsize
    if len(pixels) < wanted[0] or len(labels) < wanted[1]:
        return None
    tokens = np.frombuffer(pixels, PIXELS_DTYPE, offset=len(pixels) - wanted[0])
    classes = np.frombuffer(labels, LABELS_DTYPE, offset=len(labels) - wanted[1])
    if record_crc32(tokens, classes) != shard["record_crc32"][record]:
        return None
    return tokens.reshape(images, positions)
