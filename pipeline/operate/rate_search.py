"""python -m pipeline search: the paper's learning-rate sweep, downward by half-decades (section 3.4 and A.1).

Each learning rate is trained as an ordinary run. The sweep ends when the final validation loss no longer falls. The
same command resumes a sweep: finished runs are not repeated, stopped ones are resumed.
"""

import logging
import shlex
import shutil
import sys
from argparse import ArgumentError, ArgumentParser
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path

import yaml

from data_prep.common.command_line import value_of
from data_prep.common.exit_codes import STOPPED
from data_prep.common.files import write_json
from data_prep.common.logs import current_flags
from pipeline.checkpoint.metrics_log import METRICS_FILE, read_rows
from pipeline.command_line import parse_training
from pipeline.config import TrainConfig, changed_keys, to_dict
from pipeline.operate.run_process import RunProcess
from pipeline.operate.status import read_status
from pipeline.training_set import open_training_sets

logger = logging.getLogger(__name__)

RATE_KEY = "--optimizer.learning_rate"
SEARCH_FILE = "search.json"
LOSS_KEYS = ("seed", "model.", "objective.", "data.", "batch.global_size", "batch.first_size", "batch.warmup_steps",
            "optimizer.", "schedule.", "precision", "validation.images")  # fmt: skip
"""Options on which the final loss depends."""


@dataclass(frozen=True)
class Trial:
    """A learning rate, and the result of its run."""

    rate: float
    valid_loss: float
    """Nats per token at the last step; infinite for a run that diverged."""


class Stopped(Exception):
    """A run was stopped on request, which ends the sweep."""


def search_command(arguments: list[str]) -> int:
    """Runs the sweep. Returns 0 once the best learning rate is known, 75 if a run was stopped. Raises ValueError."""
    options, rest = _own_options(arguments)
    if "--help" in arguments or "-h" in arguments:
        print(HELP)
        return 0
    if not options["runs"]:
        raise ValueError("--runs is not set; give the folder for the runs of the sweep.")
    for key in (RATE_KEY, "--run"):
        if value_of(key, rest) is not None:
            raise ValueError(f"{key} is given, but the sweep sets it for each run; remove it.")
    first, last = (_number(f"--{key}", options[key]) for key in ("first", "last"))
    if not inf > first >= last > 0:
        raise ValueError(
            f"--first is {first:g} and --last is {last:g}; --first must be the larger of two positive numbers."
        )
    folder, launch = Path(options["runs"]), _launcher(options["launch"])
    config = parse_training([*rest, "--run", str(folder / "none")])[0]  # finds invalid options before the first run
    if config.checkpoint.folder is not None:
        raise ValueError(
            f"checkpoint.folder is {config.checkpoint.folder}, which can be of one run alone, and the sweep starts "
            f"several; remove it."
        )
    open_training_sets(config)
    folder.mkdir(parents=True, exist_ok=True)
    trials: list[Trial] = []
    process = RunProcess()
    try:
        with process.forwarding():
            for rate in half_decades(first, last):
                loss = _final_loss(folder / f"rate-{rate:g}", rate, config, [*launch, *rest], process)
                trials.append(Trial(rate, loss))
                logger.info(f"learning rate {rate:g}: final validation loss {loss:.4f}")
                if len(trials) > 1 and loss >= trials[-2].valid_loss and isfinite(trials[-2].valid_loss):
                    break
    except Stopped as stopped:
        logger.info(f"{stopped}; the same command resumes it.")
        return STOPPED
    _report(trials, folder)
    return 0


def half_decades(first: float, last: float) -> list[float]:
    """Learning rates from first down to last, rounded to three digits: 0.01, 0.003, 0.001, 0.0003, ..."""
    rates, number = [first], 1
    while True:
        rate = float(f"{first * 10.0 ** -(number // 2) * (0.3 if number % 2 else 1.0):.3g}")
        if rate < last:
            return rates
        rates.append(rate)
        number += 1


HELP = """usage: python -m pipeline search --runs FOLDER [--first 0.01] [--last 1e-05] [--launch COMMAND] [options]

Trains with peak learning rates from --first downward by half-decades until the final validation loss no longer falls,
and prints the best one. --launch is the command that starts a run; the sweep appends the run's options to it. The
default is python -m pipeline train. Examples:
  --launch "torchrun --standalone --nproc_per_node 8 -m -- pipeline train"
  --launch "srun python -m pipeline train"
All other options are those of train (python -m pipeline train --help)."""


def _own_options(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """The options of the sweep, and those of train."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for key, default in {"runs": "", "first": "0.01", "last": "1e-05", "launch": ""}.items():
        parser.add_argument(f"--{key}", default=default)
    try:
        own, rest = parser.parse_known_args(arguments)
    except ArgumentError as error:
        raise ValueError(f"{error.argument_name} has no value; give one after it.") from error
    return vars(own), rest


def _number(key: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{key} is {text!r}; it must be a number.") from error


def _launcher(launch: str) -> list[str]:
    try:
        words = shlex.split(launch) or [sys.executable, "-m", "pipeline", "train"]
    except ValueError as error:
        raise ValueError(f"--launch is {launch!r}, which is not a command ({error}).") from error
    if shutil.which(words[0]) is None:
        raise ValueError(f"--launch starts with {words[0]!r}; it must be a program on PATH.")
    return words


def _check_same(run: Path, config: TrainConfig) -> None:
    """Raises ValueError if an existing run was trained with other options on which the final loss depends."""
    if not (run / "config.yaml").exists():
        return
    earlier = yaml.safe_load((run / "config.yaml").read_text())
    for key, (old, new) in changed_keys(earlier, to_dict(config)).items():
        if key.startswith(LOSS_KEYS) and key != RATE_KEY.removeprefix("--"):
            raise ValueError(
                f"{run} was trained with {key} {old}, and now it is {new}; name another folder for --runs."
            )


def _final_loss(run: Path, rate: float, config: TrainConfig, command: list[str], process: RunProcess) -> float:
    """Trains with one learning rate, unless its run is finished. Raises Stopped, or ValueError if the run fails."""
    steps = config.schedule.steps
    _check_same(run, config)
    now = read_status(run)
    if (now.status, now.step) != ("finished", steps) and not now.diverged:
        code = process.run([*command, *current_flags(), "--run", str(run), RATE_KEY, f"{rate:g}"])
        now = read_status(run)
        if process.asked or (not now.diverged and (code == STOPPED or now.status == "stopped")):
            raise Stopped(f"{run} was stopped")
        if not now.diverged and now.status != "finished":
            raise ValueError(f"{run} ended with code {code} before its last step; see its messages above.")
    if now.diverged:
        return inf
    rows = read_rows(run / METRICS_FILE)
    losses = [row["valid_loss"] for row in rows if row.get("valid_loss") is not None and row["step"] == steps]
    return float(losses[-1]) if losses else inf


def _report(trials: list[Trial], folder: Path) -> None:
    """search.json, and the table."""
    best = min(trials, key=lambda trial: trial.valid_loss)
    if not isfinite(best.valid_loss):
        raise ValueError(
            f"all {len(trials)} learning rates down to {trials[-1].rate:g} diverged; try --first "
            f"{trials[-1].rate / 10:g}."
        )
    rows = [
        {"rate": trial.rate, "valid_loss": trial.valid_loss if isfinite(trial.valid_loss) else None} for trial in trials
    ]
    write_json(folder / SEARCH_FILE, {"best_rate": best.rate, "tried": rows})
    print("\n       lr  final validation loss, nats/token")
    for trial in trials:
        loss = f"{trial.valid_loss:.4f}" if isfinite(trial.valid_loss) else "diverged"
        print(f"{trial.rate:9g}  {loss}{'  best' if trial is best else ''}")
    edge = " (the lowest that was tried; a lower --last may find a better one)" if best is trials[-1] else ""
    print(f"\n{RATE_KEY} {best.rate:g}{edge}")
