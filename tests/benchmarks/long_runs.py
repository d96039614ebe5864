"""Folders of long runs: rows of metrics.jsonl, TensorBoard events and checkpoints, for the measurement of growth."""

import shutil
import struct
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import CRC_TABLE
from tensorboard.summary.writer.record_writer import RecordWriter

from data_prep.common.files import json_digest, read_json, write_json
from pipeline.checkpoint.format import MANIFEST
from pipeline.checkpoint.metrics_log import METRICS_FILE, TENSORBOARD_FOLDER, to_line
from pipeline.checkpoint.run_files import CHECKPOINTS_FOLDER, CONFIG_FILE, RECORD_FILE, step_folder

BATCH = 128
VALIDATION = 5_000
"""Steps between validations."""
RATES = {
    "learning_rate": 0.0012345, "grad_norm": 0.123456789, "applied": True, "images_per_second": 1234.5,
    "tokens_per_second": 1264128.0, "mfu": 0.4512, "data_wait": 0.0001, "memory_bytes": 12345678901,
}  # fmt: skip
FIRST_STEP = 1 << 21
"""Of the events, so that the steps of all have four bytes, and all records the same length."""
TABLE = np.array(CRC_TABLE, np.uint32)


def write_run(folder: Path, steps: int) -> Path:
    """A run's folder with what `status` reads, and `steps` rows."""
    folder.mkdir()
    write_json(folder / RECORD_FILE, {"status": "finished", "step": steps, "starts": [{}], "updated": ""})
    (folder / CONFIG_FILE).write_text(f"schedule: {{steps: {steps}}}\n")
    with (folder / METRICS_FILE).open("w") as rows:
        rest = to_line({**RATES, "reserved_bytes": 22345678901})[1:]
        for step in range(1, steps + 1):
            rows.write(f'{{"step": {step}, "images": {BATCH * step}, "loss": {2.5 + 1 / step}, {rest}')
            if step % VALIDATION == 0:
                rows.write(to_line({"step": step, "images": BATCH * step, "valid_loss": 2.5}))
    return folder


def write_events(run: Path, steps: int) -> None:
    """An event with the loss for each step from FIRST_STEP on, in the file of a run's one start."""
    folder = run / TENSORBOARD_FOLDER
    folder.mkdir()
    value = Summary(value=[Summary.Value(tag="train/loss", simple_value=2.5)])
    sample = Event(wall_time=1.0, step=FIRST_STEP, summary=value).SerializeToString()
    at = sample.index(_varint(FIRST_STEP))
    with (folder / "events.out.tfevents.0000000001.host").open("wb") as file:
        writer = RecordWriter(file)
        writer.write(Event(file_version="brain.Event:2").SerializeToString())
        start = SessionLog(status=SessionLog.START)
        writer.write(Event(step=FIRST_STEP, session_log=start).SerializeToString())
        head = struct.pack("<Q", len(sample))
        head += _checksums(np.frombuffer(head, np.uint8)[None]).tobytes()
        for first in range(0, steps, 100_000):
            count = np.arange(FIRST_STEP + first, FIRST_STEP + min(first + 100_000, steps), dtype=np.uint32)
            events = np.tile(np.frombuffer(sample, np.uint8), (len(count), 1))
            for byte in range(4):
                events[:, at + byte] = (count >> (7 * byte) & 0x7F) | (0x80 if byte < 3 else 0)
            heads = np.tile(np.frombuffer(head, np.uint8), (len(count), 1))
            checksums = _checksums(events).view(np.uint8).reshape(-1, 4)
            file.write(np.concatenate([heads, events, checksums], axis=1).tobytes())


def _varint(number: int) -> bytes:
    """As protobuf writes an integer below 2**28."""
    return bytes([(number >> (7 * byte) & 0x7F) | (0x80 if byte < 3 else 0) for byte in range(4)])


def _checksums(rows: np.ndarray) -> np.ndarray:
    """The masked CRC-32C of each row, uint8 (N, L) to uint32 (N,)."""
    crc = np.full(len(rows), 0xFFFFFFFF, np.uint32)
    for column in range(rows.shape[1]):
        crc = TABLE[(crc ^ rows[:, column]) & 0xFF] ^ (crc >> np.uint32(8))
    crc ^= np.uint32(0xFFFFFFFF)
    return ((crc >> np.uint32(15)) | (crc << np.uint32(17))) + np.uint32(0xA282EAD8)


def write_checkpoints(run: Path, template: Path, count: int) -> None:
    """Makes a run's checkpoints `count` copies of one, as many steps as it has apart, without files of ranks."""
    manifest = read_json(template / MANIFEST)
    del manifest["sha256"]
    shutil.rmtree(run / CHECKPOINTS_FOLDER, ignore_errors=True)
    for number in range(1, count + 1):
        folder = step_folder(run / CHECKPOINTS_FOLDER, number)
        folder.mkdir(parents=True)
        content = manifest | {"step": number, "files": {}}
        write_json(folder / MANIFEST, content | {"sha256": json_digest(content)})
