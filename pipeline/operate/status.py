"""python -m pipeline status RUN: a run's state and progress; for the job scripts, what to do after its ranks ended."""

import json
import logging
import platform
import re
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

import psutil

from data_prep.common.command_line import new_parser, parse
from data_prep.common.exit_codes import USER_ERROR
from data_prep.common.files import read_json, to_json
from data_prep.common.logs import TIME
from pipeline.checkpoint.metrics_log import METRICS_FILE, Row, read_backwards, read_last_row
from pipeline.checkpoint.run_files import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    LOCK_FILE,
    RECORD_FILE,
    committed,
    lock_holder,
    step_of,
)
from pipeline.config import HealthConfig
from pipeline.layout import BatchConfig

logger = logging.getLogger(__name__)

Action = Literal["done", "requeue", "failed"]
SPEED_ROWS = 100
"""Steps over which the speed is averaged."""
SHOWN_CHECKPOINTS = 10
HOLDER = re.compile(r"process (\d+) on ([^,]*)")
"""What a run writes to its lock file."""
FAILURES, EARLIER_FAILURES = "failures.jsonl", "accidents.jsonl"
"""A file in the run's folder, and its name in earlier versions."""


@dataclass(frozen=True)
class RunStatus:
    """What a run's folder records."""

    status: str
    """new, running, stopped, failed or finished."""
    error: str
    step: int
    """The last recorded step."""
    steps: int | None
    """Steps of the complete run; None before the first start."""
    row: dict[str, Any]
    """The last step's row of metrics.jsonl."""
    starts: int
    updated: str = ""
    """Time of the last write to run.json, in UTC, as 2026-01-31T12:00:00Z."""
    folder: Path = Path()
    """The run."""

    @property
    def diverged(self) -> bool:
        """Whether the run failed because too many losses or gradients in a row were NaN or Inf."""
        return self.status == "failed" and self.error.startswith("Diverged")


def read_status(run: Path) -> RunStatus:
    """Reads run.json, config.yaml and the end of metrics.jsonl. Raises ValueError if run.json is damaged."""
    if not (run / RECORD_FILE).is_file():
        return RunStatus("new", "", 0, None, {}, 0, folder=run)
    record = None
    with suppress(ValueError):
        record = read_json(run / RECORD_FILE)
    if not isinstance(record, dict):
        raise ValueError(f"{run / RECORD_FILE} is damaged: it is not a record of a run; restore it, or delete it.")
    row = read_last_row(run / METRICS_FILE, "loss") or {}
    step = max(int(row.get("step", 0)), int(record.get("step", 0)))
    starts = len(record.get("starts", []))
    updated = str(record.get("updated", ""))
    return RunStatus(
        str(record.get("status", "")), str(record.get("error", "")), step, _steps(run), row, starts, updated, run
    )


def _steps(run: Path) -> int | None:
    with suppress(KeyError, TypeError, ValueError):
        return int(_config(run)["schedule"]["steps"])
    return None


def _config(run: Path) -> dict[str, Any]:
    """The content of config.yaml; empty if it is missing or damaged."""
    import yaml

    with suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
        content = yaml.safe_load((run / CONFIG_FILE).read_text())
        return content if isinstance(content, dict) else {}
    return {}


def next_action(
    run: Path, code: int, restarts: int, max_restarts: int, max_failures: int, since: str = "", *, asked: bool = False
) -> tuple[Action, str]:
    """What to do with a run whose ranks ended with `code`, and why. A failure is recorded in the run.

    restarts: how often the job was requeued before. An end without a request to stop (a killed rank, a hang, a lost
    node) is a failure. After `max_failures` failures in a row without progress, the job fails: progress is another
    newest checkpoint or, before the first one, a further step.

    since: time at which this start of the job began, in UTC; a status that is older is that of an earlier start.
    asked: the job was asked to stop. The signal itself ends ranks that are still importing their packages.
    """
    now = read_status(run)
    updated = now.updated >= since
    if now.status == "finished" and (updated or code == 0):
        return "done", f"finished at step {now.step:,}"
    if not updated:
        now = replace(now, status="", error="")
    if code == USER_ERROR or (now.status == "failed" and now.error.startswith(("ValueError", "Diverged", "Replicas"))):
        return "failed", now.error or "the options are invalid; see the message in the log"
    if restarts >= max_restarts:
        return "failed", f"it was requeued {restarts} times, which is MAX_RESTARTS"
    if now.status == "stopped" or (asked and not updated):
        return "requeue", f"stopped on request at step {now.step:,}"
    checkpoint = _newest_checkpoint(run)
    failures = _failures_in_a_row(_record_failure(run, now, code, checkpoint))
    if failures >= max_failures:
        where = f"after the checkpoint of step {checkpoint:,}" if checkpoint else f"at step {now.step:,}"
        return "failed", f"it failed {failures} times {where}, which is MAX_FAILURES"
    return "requeue", f"it ended with code {code} after step {now.step:,}" + (f": {now.error}" if now.error else "")


def _newest_checkpoint(run: Path) -> int:
    """The step of the run's newest checkpoint; 0 if it has none."""
    with suppress(OSError):
        return max(map(step_of, committed(run / CHECKPOINTS_FOLDER)), default=0)
    return 0


def _record_failure(run: Path, now: RunStatus, code: int, checkpoint: int) -> list[tuple[int, int]]:
    """Adds a failure. Returns (newest checkpoint, last step) of all recorded ones; a truncated line is skipped."""
    paths = [run / EARLIER_FAILURES, run / FAILURES]
    earlier = "\n".join(path.read_text(errors="replace") for path in paths if path.is_file())
    failure = {"time": time.time(), "step": now.step, "checkpoint": checkpoint, "code": code, "error": now.error}
    with paths[-1].open("a") as file:
        if earlier and not earlier.endswith("\n"):
            file.write("\n")
        file.write(to_json(failure) + "\n")
    found = []
    for line in earlier.splitlines():
        with suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            found.append((int(row.get("checkpoint", 0)), int(row["step"])))  # earlier versions had no checkpoint
    return [*found, (checkpoint, now.step)]


def _failures_in_a_row(failures: list[tuple[int, int]]) -> int:
    """How many of the last ones had the same newest checkpoint and, while there was none, got no further."""
    count, last, furthest = 0, 0, -1
    for checkpoint, step in failures:
        if checkpoint != last or (not checkpoint and step > furthest):
            count, furthest = 0, step
        count, last = count + 1, checkpoint
    return count


def status_command(arguments: list[str]) -> int:
    """Prints a run's state and progress. With --after, prints done, requeue or failed for a job script."""
    parser = new_parser("python -m pipeline status", "Prints a run's state and progress.")
    parser.add_argument("run", type=Path, help="The run's folder.")
    after = "For job scripts: exit code of the ranks; prints done, requeue or failed instead."
    parser.add_argument("--after", type=int | None, help=after)
    parser.add_argument("--restarts", type=int, default=0, help="How often its job was requeued.")
    parser.add_argument("--max_restarts", type=int, default=100, help="How often its job may be requeued.")
    parser.add_argument(
        "--since", type=str, default="", help="Time at which its ranks were started, as 2026-01-31T12:00:00Z."
    )
    parser.add_argument("--asked", action="store_true", help="The job was asked to stop.")
    failures = "Failures in a row without a new checkpoint after which the job fails."
    # Jobs that an earlier version started call it --max_accidents.
    parser.add_argument("--max_failures", "--max_accidents", type=int, default=3, help=failures)
    chosen = parse(parser, arguments)
    if chosen.after is not None:
        chosen.run.mkdir(parents=True, exist_ok=True)
        limits = chosen.restarts, chosen.max_restarts, chosen.max_failures
        action, why = next_action(chosen.run, chosen.after, *limits, chosen.since, asked=chosen.asked)
        logger.info(f"{chosen.run}: {why}")
        print(action)
        return 0
    if not (chosen.run / RECORD_FILE).is_file():
        raise ValueError(f"{chosen.run} has no run.json; it must be the folder of a run that was started.")
    print(describe(read_status(chosen.run)))
    return 0


def describe(now: RunStatus) -> str:
    """Some lines to read."""
    try:
        holder = lock_holder(now.folder)
        lock = "not held" if holder is None else f"held by {holder}"
    except OSError as error:
        lock = f"unknown: the lock can't be tested ({error.strerror})"
    steps = [step_of(folder) for folder in committed(now.folder / CHECKPOINTS_FOLDER)]
    state, running = f"{now.status}{': ' + now.error if now.error else ''}", now.status == "running"
    if running and lock == "not held":
        running = not _has_ended(now.folder)
        newest = f" from the checkpoint of step {steps[-1]:,}" if steps else ""
        state = (
            f"running, but this machine sees no lock; the last write was {_ago(_silence(now.folder))} ago"
            if running
            else "not running: it was killed, or its machine failed; the same command (without --resume_from) resumes "
            f"it{newest}"
        )
    share = f" ({now.step / now.steps:.1%})" if now.steps and now.step <= now.steps else ""
    of = f" of {now.steps:,}{share}" if now.steps else ""
    lines = {"step": f"{now.step:,}{of}; started {'once' if now.starts == 1 else f'{now.starts} times'}"}
    if now.row:
        lines |= _describe_metrics(now, running)
    retained = ", ".join(f"{step:,}" for step in steps[-SHOWN_CHECKPOINTS:])
    more = f" and {len(steps) - SHOWN_CHECKPOINTS} older ones" if len(steps) > SHOWN_CHECKPOINTS else ""
    lines["saved"] = f"steps {retained}{more}" if steps else "no checkpoint"
    lines["lock"] = lock
    return "\n".join([state, *(f"  {name:<9} {text}" for name, text in lines.items())])


def _has_ended(run: Path) -> bool:
    """Whether a run whose lock is free was killed. Where locks are local to a node, it may run on another one."""
    holder = HOLDER.match((run / LOCK_FILE).read_text()) if (run / LOCK_FILE).is_file() else None
    if holder and holder[2] == platform.node() and not psutil.pid_exists(int(holder[1])):
        return True
    minutes = HealthConfig().hang_minutes
    with suppress(KeyError, TypeError, ValueError):
        minutes = float(_config(run)["health"]["hang_minutes"])
    return _silence(run) > 60 * minutes


def _silence(run: Path) -> float:
    """Seconds since the run's last write to metrics.jsonl or run.json."""
    files = [run / METRICS_FILE, run / RECORD_FILE]
    return time.time() - max(file.stat().st_mtime for file in files if file.is_file())


def _describe_metrics(now: RunStatus, running: bool) -> dict[str, str]:
    """Lines about the end of metrics.jsonl; with the time left if the run is running."""
    metrics = now.folder / METRICS_FILE
    speed = _images_per_second(list(islice(read_backwards(metrics, "loss"), SPEED_ROWS + 1)))
    lines = {"loss": f"{_nats(now.row['loss'])}, {speed:,.1f} images/s"}
    valid = read_last_row(metrics, "valid_loss")
    if valid is not None:
        average = f", {_loss(valid['valid_loss_ema'])} with averaged weights," if "valid_loss_ema" in valid else ""
        by_set = valid.get("valid_loss_by_set") or {}
        each = "".join(f"; {name} {_loss(loss)}" for name, loss in by_set.items())
        lines["valid"] = f"{_nats(valid['valid_loss'])}{average} at step {valid['step']:,}{each}"
    if (probe := read_last_row(metrics, "probe_accuracy")) is not None:
        accuracy = "NaN or Inf" if probe["probe_accuracy"] is None else f"{probe['probe_accuracy']:.1%}"
        lines["probe"] = f"{accuracy} at layer {probe['probe_layer']}, at step {probe['step']:,}"
    written = metrics.stat().st_mtime
    lines["written"] = f"{time.strftime(TIME, time.localtime(written))}, {_ago(time.time() - written)} ago"
    images = _images_left(now)
    if running and speed and images is not None:
        hours = images / speed / 3600
        lines["left"] = f"{hours:,.1f}" if hours >= 1 else f"{hours:.2g}"
        lines["left"] += " hours at this throughput"
    return lines


def _nats(loss: float | None) -> str:
    return "NaN or Inf" if loss is None else f"{loss:.4f} nats per token"


def _loss(loss: float | None) -> str:
    return "NaN or Inf" if loss is None else f"{loss:.4f}"


def _ago(seconds: float) -> str:
    """A duration in its largest unit."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} seconds"


def _images_per_second(rows: list[Row]) -> float:
    """The throughput over these steps' rows, newest first; validation, samples and saves are excluded."""
    images, seconds = 0, 0.0
    for row, before in pairwise(rows):
        size, rate = row.get("images", 0) - before.get("images", 0), row.get("images_per_second")
        if size > 0 and rate:
            images, seconds = images + size, seconds + size / rate
    return images / seconds if seconds else (rows[0].get("images_per_second") or 0.0) if rows else 0.0


def _images_left(now: RunStatus) -> int | None:
    """The images of the steps to come; None if config.yaml has no batch sizes."""
    with suppress(KeyError, TypeError, ValueError):
        batch = BatchConfig(**_config(now.folder)["batch"])
        if now.steps:
            return batch.images_after(now.steps) - batch.images_after(min(now.step, now.steps))
    return None
