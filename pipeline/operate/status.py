"""python -m pipeline status RUN: a run's state and progress; for the job scripts, what to do after its ranks ended."""

import json
import logging
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from data_prep.common.command_line import new_parser, parse
from data_prep.common.exit_codes import USER_ERROR
from data_prep.common.files import read_json, to_json
from pipeline.checkpoint.metrics_log import METRICS_FILE, read_last_row

logger = logging.getLogger(__name__)

Action = Literal["done", "requeue", "failed"]
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

    @property
    def diverged(self) -> bool:
        """Whether the run failed because too many losses or gradients in a row were NaN or Inf."""
        return self.status == "failed" and self.error.startswith("Diverged")


def read_status(run: Path) -> RunStatus:
    """Reads run.json, config.yaml and the end of metrics.jsonl. Raises ValueError if run.json is damaged."""
    if not (run / "run.json").is_file():
        return RunStatus("new", "", 0, None, {}, 0)
    record = read_json(run / "run.json")
    if not isinstance(record, dict):
        raise ValueError(f"{run / 'run.json'} does not contain a run's record; restore the file.")
    row = read_last_row(run / METRICS_FILE, "loss") or {}
    step = max(int(row.get("step", 0)), int(record.get("step", 0)))
    starts = len(record.get("starts", []))
    updated = str(record.get("updated", ""))
    return RunStatus(
        str(record.get("status", "")), str(record.get("error", "")), step, _steps(run), row, starts, updated
    )


def _steps(run: Path) -> int | None:
    import yaml

    with suppress(OSError, KeyError, TypeError, yaml.YAMLError):
        return int(yaml.safe_load((run / "config.yaml").read_text())["schedule"]["steps"])
    return None


def next_action(
    run: Path, code: int, restarts: int, max_restarts: int, max_failures: int, since: str = "", *, asked: bool = False
) -> tuple[Action, str]:
    """What to do with a run whose ranks ended with `code`, and why. A failure is recorded in the run.

    restarts: how often the job was requeued before. An end without a request to stop (a killed rank, a hang, a lost
    node) is a failure. After `max_failures` failures in a row at the same step, the job fails.

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
    steps = _record_failure(run, now, code)[-max_failures:]
    if len(steps) == max_failures and max(steps) == min(steps):
        return "failed", f"it failed {max_failures} times at step {now.step:,}, which is MAX_FAILURES"
    return "requeue", f"it ended with code {code} after step {now.step:,}" + (f": {now.error}" if now.error else "")


def _record_failure(run: Path, now: RunStatus, code: int) -> list[int]:
    """Adds a failure. Returns the steps of all recorded failures; a line that a kill truncated is skipped."""
    paths = [run / EARLIER_FAILURES, run / FAILURES]
    earlier = "\n".join(path.read_text() for path in paths if path.is_file())
    with paths[-1].open("a") as file:
        if earlier and not earlier.endswith("\n"):
            file.write("\n")
        file.write(to_json({"time": time.time(), "step": now.step, "code": code, "error": now.error}) + "\n")
    steps = []
    for line in earlier.splitlines():
        with suppress(ValueError):
            steps.append(int(json.loads(line)["step"]))
    return [*steps, now.step]


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
    failures = "Failures in a row at the same step after which the job fails."
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
    if not (chosen.run / "run.json").is_file():
        raise ValueError(f"{chosen.run} has no run.json; it must be the folder of a run that was started.")
    print(describe(read_status(chosen.run)))
    return 0


def describe(now: RunStatus) -> str:
    """Some lines to read."""
    lines = [f"{now.status}{': ' + now.error if now.error else ''}"]
    of = f" of {now.steps:,} ({now.step / now.steps:.1%})" if now.steps else ""
    lines.append(f"  step      {now.step:,}{of}; started {now.starts} times")
    if now.row:
        throughput = now.row.get("images_per_second") or 0.0
        loss = "NaN or Inf" if now.row["loss"] is None else f"{now.row['loss']} nats per token"
        lines.append(f"  loss      {loss}, {throughput:,.1f} images/s")
        if now.step and throughput and now.steps and now.status != "finished":
            step_seconds = now.row["images"] / now.step / throughput
            lines.append(f"  left      {(now.steps - now.step) * step_seconds / 3600:,.1f} hours at this throughput")
    return "\n".join(lines)
