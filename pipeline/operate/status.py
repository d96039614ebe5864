"""python -m pipeline status RUN: where a run stands; and, for the job scripts, what is to be done after it ended."""

import json
import logging
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from data_prep.common.command_line import new_parser, parse
from data_prep.common.exit_codes import USER_ERROR
from data_prep.common.files import read_json
from pipeline.checkpoint.metrics_log import METRICS_FILE, read_last_row

logger = logging.getLogger(__name__)

Action = Literal["done", "requeue", "failed"]
FAILURES, EARLIER_FAILURES = "failures.jsonl", "accidents.jsonl"
"""Of a run, and the name in runs of earlier versions."""


@dataclass(frozen=True)
class Standing:
    """What a run's folder says."""

    status: str
    """new, running, stopped, failed or finished."""
    error: str
    step: int
    """The last step that was recorded."""
    steps: int | None
    """All that it will make; None before the first start."""
    row: dict[str, Any]
    """The last step's row of metrics.jsonl."""
    starts: int
    updated: str = ""
    """When run.json was written, in UTC as 2026-01-31T12:00:00Z."""

    @property
    def diverged(self) -> bool:
        """Whether the run ended because its loss or weights were not finite for too long."""
        return self.status == "failed" and self.error.startswith("Diverged")


def standing(run: Path) -> Standing:
    """Reads run.json, config.yaml and the end of metrics.jsonl. Raises ValueError if there is no such run."""
    if not (run / "run.json").is_file():
        return Standing("new", "", 0, None, {}, 0)
    record = read_json(run / "run.json")
    if not isinstance(record, dict):
        raise ValueError(f"{run / 'run.json'} is no run's record any more; put it back as it was.")
    row = read_last_row(run / METRICS_FILE, "loss") or {}
    step = max(int(row.get("step", 0)), int(record.get("step", 0)))
    starts = len(record.get("starts", []))
    updated = str(record.get("updated", ""))
    return Standing(
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
    """What is to be done with a run whose ranks ended with `code`, and why; a failure is noted in the run.

    restarts: how often the job was queued again so far. An end that no one asked for (a killed rank, a hang, a lost
    node) is a failure; after `max_failures` of them without a further step in between the job ends.

    since: when this start of the job began, in UTC; what the run says of itself from before is an earlier start's word.
    asked: the job was asked to stop; ranks that are still loading their packages end by the signal itself.
    """
    now = standing(run)
    opened = now.updated >= since
    if now.status == "finished" and (opened or code == 0):
        return "done", f"finished at step {now.step:,}"
    if not opened:
        now = replace(now, status="", error="")
    if code == USER_ERROR or (now.status == "failed" and now.error.startswith(("ValueError", "Diverged", "Replicas"))):
        return "failed", now.error or "the command refused its options; see the log"
    if restarts >= max_restarts:
        return "failed", f"it was queued {restarts} times again, which is MAX_RESTARTS"
    if now.status == "stopped" or (asked and not opened):
        return "requeue", f"stopped on request at step {now.step:,}"
    here = _note_failure(run, now, code)[-max_failures:]
    if len(here) == max_failures and max(here) == min(here):
        return "failed", f"it failed {max_failures} times at step {now.step:,}, which is MAX_FAILURES"
    return "requeue", f"it ended with code {code} after step {now.step:,}" + (f": {now.error}" if now.error else "")


def _note_failure(run: Path, now: Standing, code: int) -> list[int]:
    """Adds one. Returns the steps of all that were noted; a line that a kill cut short is skipped."""
    paths = [run / EARLIER_FAILURES, run / FAILURES]
    earlier = "\n".join(path.read_text() for path in paths if path.is_file())
    with paths[-1].open("a") as file:
        if earlier and not earlier.endswith("\n"):
            file.write("\n")
        file.write(json.dumps({"time": time.time(), "step": now.step, "code": code, "error": now.error}) + "\n")
    steps = []
    for line in earlier.splitlines():
        with suppress(ValueError):
            steps.append(int(json.loads(line)["step"]))
    return [*steps, now.step]


def status_command(arguments: list[str]) -> int:
    """Prints where a run stands. With --after, one word for a job script: done, requeue or failed."""
    parser = new_parser("python -m pipeline status", "Where a run stands.")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--after", type=int | None, help="exit code of its ranks: print done, requeue or failed")
    parser.add_argument("--restarts", type=int, default=0, help="how often its job was queued again")
    parser.add_argument("--max_restarts", type=int, default=100, help="how often it may be")
    parser.add_argument("--since", type=str, default="", help="when its ranks were started, as 2026-01-31T12:00:00Z")
    parser.add_argument("--asked", action="store_true", help="the job was asked to stop")
    failures = "failures without a step between that are too many"  # accidents: of jobs that an earlier version started
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
        raise ValueError(f"{chosen.run} holds no run.json; it must be the folder of a run that was started.")
    print(describe(standing(chosen.run)))
    return 0


def describe(now: Standing) -> str:
    """A few lines for a person."""
    lines = [f"{now.status}{': ' + now.error if now.error else ''}"]
    of = f" of {now.steps:,} ({now.step / now.steps:.1%})" if now.steps else ""
    lines.append(f"  step      {now.step:,}{of}; started {now.starts} times")
    if now.row:
        rate = now.row.get("images_per_second") or 0.0
        loss = "NaN or Inf" if now.row["loss"] is None else f"{now.row['loss']} nats per token"
        lines.append(f"  loss      {loss}, {rate:,.1f} images/s")
        if now.step and rate and now.steps and now.status != "finished":
            a_step = (now.row["images"] / now.step) / rate
            lines.append(f"  left      {(now.steps - now.step) * a_step / 3600:,.1f} hours at this rate")
    return "\n".join(lines)
