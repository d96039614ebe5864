"""Copies a run's TensorBoard events up to a step into one file, whose name does not contain a host name."""

from pathlib import Path

FILE = "events.out.tfevents.0"
"""TensorBoard recognizes its files by "tfevents" in the name."""


def copy_events(folder: Path, target: Path, step: int) -> None:
    """Writes the events up to a step of all files in `folder` into one file in the folder `target`.

    Steps that a resumed run repeated are in it once, as TensorBoard shows them.
    """
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.summary.writer.record_writer import RecordWriter

    events: list[tuple[int, bytes]] = []
    for file in sorted(folder.glob("events.out.tfevents.*")):
        for record in RawEventFileLoader(str(file)).Load():
            event = Event.FromString(record)
            if event.session_log.status == SessionLog.START:  # a restart drops the steps that it will repeat
                events = [(at, earlier) for at, earlier in events if at < event.step]
            elif event.step <= step:
                events.append((event.step, record))
    if events:
        target.mkdir()
        with (target / FILE).open("wb") as out:
            writer = RecordWriter(out)
            for _, record in events:
                writer.write(record)
