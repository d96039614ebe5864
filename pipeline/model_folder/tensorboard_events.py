"""A run's TensorBoard events up to a step, as one file whose name tells no machine."""

from pathlib import Path

FILE = "events.out.tfevents.0"
"""TensorBoard knows its files by the middle of the name."""


def copy_events(folder: Path, target: Path, step: int) -> None:
    """Writes the events of all files in `folder` up to a step into one in the folder `target`.

    What a resumed run made anew stands there once, as TensorBoard shows it.
    """
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.summary.writer.record_writer import RecordWriter

    kept: list[tuple[int, bytes]] = []
    for file in sorted(folder.glob("events.out.tfevents.*")):
        for record in RawEventFileLoader(str(file)).Load():
            event = Event.FromString(record)
            if event.session_log.status == SessionLog.START:  # a start drops the steps that it will make anew
                kept = [(at, earlier) for at, earlier in kept if at < event.step]
            elif event.step <= step:
                kept.append((event.step, record))
    if kept:
        target.mkdir()
        with (target / FILE).open("wb") as out:
            writer = RecordWriter(out)
            for _, record in kept:
                writer.write(record)
