"""The folders of long runs are those that train writes: read by TensorBoard, and by our own readers."""

import json
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from pipeline.checkpoint.metrics_log import METRICS_FILE, TENSORBOARD_FOLDER, read_rows, to_line
from pipeline.checkpoint.metrics_table import STEP
from tests.benchmarks.long_runs import BATCH, FIRST_STEP, write_events, write_run


def test_events_have_the_checksums_that_tensorboard_demands(tmp_path: Path) -> None:
    """The reader stops at a wrong one."""
    write_events(tmp_path, 300)
    [file] = (tmp_path / TENSORBOARD_FOLDER).iterdir()
    version, start, *events = LegacyEventFileLoader(str(file)).Load()
    assert version.file_version == "brain.Event:2" and start.session_log.status == start.session_log.START
    assert [event.step for event in events] == list(range(FIRST_STEP, FIRST_STEP + 300))
    assert {(event.summary.value[0].tag, event.summary.value[0].simple_value) for event in events} == {
        ("train/loss", 2.5)
    }


def test_rows_have_the_form_in_which_train_writes_them(tmp_path: Path) -> None:
    """So that they are read as those of a run."""
    run = write_run(tmp_path / "run", 3)
    lines = (run / METRICS_FILE).read_text().splitlines(keepends=True)
    assert [to_line(json.loads(line)) for line in lines] == lines
    assert all(STEP.fullmatch(line.encode()) for line in lines)
    assert [(row["step"], row["images"]) for row in read_rows(run / METRICS_FILE)] == [
        (step, BATCH * step) for step in (1, 2, 3)
    ]
