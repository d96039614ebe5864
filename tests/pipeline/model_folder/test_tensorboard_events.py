"""The events of a run up to a step, against TensorBoard's own reader, which reads them one by one."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.event_pb2 import SessionLog
from torch.utils.tensorboard import SummaryWriter

from pipeline.model_folder import tensorboard_events
from pipeline.model_folder.tensorboard_events import copy_events

Read = list[tuple[int, str, bytes]]


def values(folder: Path) -> Read:
    """Step, tag and content of every value, as TensorBoard reads the files, oldest first."""
    found: Read = []
    for file in sorted(folder.glob("events.out.tfevents.*")):
        for event in LegacyEventFileLoader(str(file)).Load():
            if event.session_log.status == SessionLog.START:
                found = [one for one in found if one[0] < event.step]
            found += [(event.step, value.tag, value.SerializeToString()) for value in event.summary.value]
    return found


def write(folder: Path, first: int, last: int, number: int) -> None:
    """A start of a run that records the steps from `first` to `last`, as telemetry.py does."""
    writer = SummaryWriter(str(folder), purge_step=first, filename_suffix=f".{number}")
    grid = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for step in range(first, last + 1):
        writer.add_scalar("train/loss", 1 / step, step)
        writer.add_scalar("train/images", 128.0 * step, step)
        if step % 50 == 0:
            writer.add_image("completions", grid, step, dataformats="HWC")
    writer.close()
    [file] = folder.glob(f"*.{number}")
    file.rename(folder / f"events.out.tfevents.{number:010d}.host")  # starts within one second have the same name


@pytest.mark.parametrize("block", [1, 1 << 10, 1 << 20])
def test_events_up_to_a_step_are_those_that_tensorboard_reads(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three starts, of which two repeat steps, and a last record that is cut short; any step, and beyond the end."""
    monkeypatch.setattr(tensorboard_events, "BLOCK_BYTES", block)
    run = tmp_path / "run"
    for number, (first, last) in enumerate(((1, 130), (101, 220), (61, 260)), 1):
        write(run, first, last, number)
    newest = max(run.iterdir())
    newest.write_bytes(newest.read_bytes()[:-7])
    (run / "events.out.tfevents.0000000000.host").touch()
    everything = values(run)
    assert len(everything) > 500
    for step in (0, 1, 50, 60, 61, 259, 260, 1000, *random.Random(0).sample(range(2, 259), 5)):
        copy = tmp_path / f"copy-{step}"
        copy_events(run, copy, step)
        expected = [one for one in everything if one[0] <= step]
        assert (values(copy) if copy.exists() else []) == expected
    for file in copy.iterdir():
        assert "host" not in file.name
        copied = list(LegacyEventFileLoader(str(file)).Load())
        assert copied[0].file_version == "brain.Event:2"
        assert not any(event.HasField("session_log") for event in copied)


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: flipped(content, len(content) // 4), id="a byte"),
        pytest.param(lambda content: content[:3000] + bytes(4096) + content[7096:], id="a hole of zeros"),
        pytest.param(lambda content: flipped(content, 20), id="the head"),
        pytest.param(lambda content: content + bytes(1_000_000), id="a tail of zeros"),
    ],
)
def test_of_a_damaged_file_is_copied_what_tensorboard_reads(
    damage: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of two starts is damaged; the second is whole."""
    monkeypatch.setattr(tensorboard_events, "BLOCK_BYTES", 1 << 10)
    run = tmp_path / "run"
    write(run, 1, 200, 1)
    write(run, 151, 300, 2)
    first = min(run.iterdir())
    first.write_bytes(damage(first.read_bytes()))
    everything = values(run)
    assert {step for step, *_ in everything} >= set(range(151, 301))
    for step in (10, 140, 149, 200, 250, 300):
        copy = tmp_path / f"copy-{step}"
        copy_events(run, copy, step)
        assert (values(copy) if copy.exists() else []) == [one for one in everything if one[0] <= step]


def test_the_events_of_a_long_run_are_not_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2,000 events fewer than 500 are parsed."""
    parsed = []
    at = tensorboard_events._Events._at
    monkeypatch.setattr(tensorboard_events._Events, "_at", lambda self, start: parsed.append(start) or at(self, start))
    write(tmp_path / "run", 1, 1000, 1)
    copy_events(tmp_path / "run", tmp_path / "copy", 700)
    assert len(values(tmp_path / "copy")) == 2 * 700 + 14
    assert len(parsed) < 500
