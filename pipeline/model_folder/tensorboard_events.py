"""Copies a run's TensorBoard events up to a step into files whose names do not contain a host name.

A run of millions of steps has gigabytes of events, so they are not read one by one: their steps rise within a file, the
place where a file is cut is found by bisection, and what precedes it is copied as it is. A file is a TFRecord: each
record has the length of its event, a checksum of the length, the event, and a checksum of the event.
"""

import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, BinaryIO

FILE = "events.out.tfevents.{:06d}"
"""TensorBoard recognizes its files by "tfevents" in the name, and reads them in the order of their names."""
HEAD = struct.Struct("<QI")
CHECKSUM = struct.Struct("<I")
LENGTH = re.compile(rb"(?!\0{3})[\s\S]{3}\0{5}")
"""What may be a record's length: not 0, and less than 16 MiB. Damaged files may end in many zeros."""
BLOCK_BYTES = 1 << 14
"""Bytes within which the records are read one after the other."""
COPIED_BYTES = 1 << 24
"""Bytes that are copied at once."""


class _Events:
    """The records of a file."""

    def __init__(self, content: mmap) -> None:
        self._content = content
        self.version, self.purged = b"", None
        """The record with the file's format, and the step from which on a resumed run repeats the earlier files'."""
        self.first = 0
        """Where the first record with values begins."""
        while (record := self._at(self.first)) and record[1].WhichOneof("what") in ("file_version", "session_log"):
            end, event = record
            if event.session_log.status == event.session_log.START:
                self.purged = event.step
            elif not self.version:
                self.version = content[self.first : end]
            self.first = end

    def end_of(self, step: int) -> int:
        """Where the first event of a later step begins, or what was written completely ends."""
        low, high = self.first, len(self._content)
        while high - low > BLOCK_BYTES:
            middle = (low + high) // 2
            found = self._next(middle, high)
            if found is None or found[1].step > step:
                high = middle
            else:
                low = found[0]
        while (record := self._at(low)) and record[1].step <= step:
            low = record[0]
        return low

    def _at(self, start: int) -> tuple[int, Any] | None:
        """Where the record ends that begins there, and its event; None if none does, or it is incomplete."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

        head = self._content[start : start + HEAD.size]
        if len(head) < HEAD.size or masked_crc32c(head[:8]) != HEAD.unpack(head)[1]:
            return None
        end = start + HEAD.size + HEAD.unpack(head)[0]
        event, checksum = self._content[start + HEAD.size : end], self._content[end : end + CHECKSUM.size]
        if len(checksum) < CHECKSUM.size or masked_crc32c(event) != CHECKSUM.unpack(checksum)[0]:
            return None
        return end + CHECKSUM.size, Event.FromString(event)

    def _next(self, start: int, limit: int) -> tuple[int, Any] | None:
        """Where the first record begins from some place on, and its event; None if there is none up to `limit`."""
        while found := LENGTH.search(self._content, start, limit):
            start = found.start()
            if record := self._at(start):
                return start, record[1]
            start += 1
        return None


def copy_events(folder: Path, target: Path, step: int) -> None:
    """Writes the events up to a step of each file in `folder` into a file in the folder `target`.

    Steps that a resumed run repeated are in them once, as TensorBoard shows them. The steps of a file must rise. Of a
    damaged file TensorBoard shows what precedes the damage; that is so of the copies too.
    """
    parts: list[tuple[Path, bytes, int, int]] = []
    for file in sorted(folder.glob("events.out.tfevents.*"), reverse=True):
        with _mapped(file) as events:
            if events is None:
                continue
            if (end := events.end_of(step)) > events.first:
                parts.append((file, events.version, events.first, end))
            if events.purged is not None:  # a restart drops the steps that it will repeat
                step = min(step, events.purged - 1)
    if parts:
        target.mkdir()
        for number, (file, version, start, end) in enumerate(reversed(parts)):
            with (target / FILE.format(number)).open("wb") as out:
                out.write(version)
                _copy(file, start, end, out)


@contextmanager
def _mapped(file: Path) -> Iterator[_Events | None]:
    """The file's records; None if it is empty."""
    with file.open("rb") as source:
        if not file.stat().st_size:
            yield None
            return
        with mmap(source.fileno(), 0, access=ACCESS_READ) as content:
            yield _Events(content)


def _copy(file: Path, start: int, end: int, out: BinaryIO) -> None:
    with file.open("rb") as source:
        source.seek(start)
        while start < end and (some := source.read(min(COPIED_BYTES, end - start))):
            out.write(some)
            start += len(some)
