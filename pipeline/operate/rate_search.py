"""python -m pipeline search: the paper's learning-rate sweep, downward by half-decades (section 3.4 and A.1).

Each rate is an ordinary run; the search starts the next one while the final validation loss still falls. It can be
started again: finished runs are not run twice, stopped ones are gone on with.
"""

import logging
import shlex
import shutil
import subprocess
import sys
from argparse import ArgumentError, ArgumentParser
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path

import yaml

from data_prep.common.command_line import value_of
from data_prep.common.exit_codes import STOPPED
from data_prep.common.files import write_json
from data_prep.shards.reader import open_shard_set
from pipeline.checkpoint.metrics_log import METRICS_FILE, read_rows
from pipeline.command_line import parse_training
from pipeline.config import TrainConfig, changed_keys, to_dict
from pipeline.operate.status import standing

logger = logging.getLogger(__name__)

RATE_KEY = "--optimizer.learning_rate"
SEARCH_FILE = "search.json"
DECISIVE = ("seed", "model.", "objective.", "data.", "batch.global_size", "batch.first_size", "batch.warmup_steps",
            "optimizer.", "schedule.", "precision", "validation.images")  # fmt: skip
"""Options that the final loss depends on."""


@dataclass(frozen=True)
class Tried:
    """A rate and where its run ended."""

    rate: float
    valid_loss: float
    """Nats per token at the last step; infinite for a run that diverged."""


class Stopped(Exception):
    """A run was asked to stop, and so the search."""


def search_command(arguments: list[str]) -> int:
    """Runs the search. Returns 0 when the best rate is known, 75 if a run was stopped. Raises ValueError."""
    options, rest = _own_options(arguments)
    if "--help" in arguments or "-h" in arguments:
        print(HELP)
        return 0
    if not options["runs"]:
        raise ValueError("--runs is not set; give the folder that the runs of the search are kept in.")
    for key in (RATE_KEY, "--run"):
        if value_of(key, rest) is not None:
            raise ValueError(f"{key} is given, but the search sets it for each run; leave it out.")
    first, last = (_number(f"--{key}", options[key]) for key in ("first", "last"))
    if not inf > first >= last > 0:
        raise ValueError(f"--first is {first:g} and --last is {last:g}; the search goes down from first to last.")
    folder, launch = Path(options["runs"]), _launcher(options["launch"])
    config = parse_training([*rest, "--run", str(folder / "none")])[0]  # every mistake is found now
    if config.data.shards is None:
        raise ValueError("data.shards is not set; give the folder of a shard set (python -m data_prep shards).")
    open_shard_set(config.data.shards)
    folder.mkdir(parents=True, exist_ok=True)
    tried: list[Tried] = []
    try:
        for rate in half_decades(first, last):
            tried.append(Tried(rate, _final_loss(folder / f"rate-{rate:g}", rate, config, launch, rest)))
            logger.info(f"learning rate {rate:g}: final validation loss {tried[-1].valid_loss:.4f}")
            if len(tried) > 1 and tried[-1].valid_loss >= tried[-2].valid_loss and isfinite(tried[-2].valid_loss):
                break
    except Stopped as stopped:
        logger.info(f"{stopped}; the same command resumes it.")
        return STOPPED
    _report(tried, folder)
    return 0


def half_decades(first: float, last: float) -> list[float]:
    """first, and down from it in turns by 0.3 and by a third, to a digit: .01, .003, .001, .0003 ..."""
    rates, number = [first], 1
    while True:
        rate = float(f"{first * 10.0 ** -(number // 2) * (0.3 if number % 2 else 1.0):.3g}")
        if rate < last:
            return rates
        rates.append(rate)
        number += 1


HELP = """usage: python -m pipeline search --runs FOLDER [--first 0.01] [--last 1e-05] [--launch COMMAND] [options]

Trains with peak learning rates from --first downward by half-decades until the final validation loss stops falling, and
prints which was best. --launch is what a run's options are appended to, by default python -m pipeline train. Examples:
  --launch "torchrun --standalone --nproc_per_node 8 -m -- pipeline train"
  --launch "srun python -m pipeline train"
All other options are train's (python -m pipeline train --help)."""


def _own_options(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """The search's own options, and train's."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for key, default in {"runs": "", "first": "0.01", "last": "1e-05", "launch": ""}.items():
        parser.add_argument(f"--{key}", default=default)
    try:
        own, rest = parser.parse_known_args(arguments)
    except ArgumentError as error:
        raise ValueError(f"{error.argument_name} has no value; it must be followed by its value.") from error
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
        raise ValueError(f"--launch is {launch!r}, which is no command ({error}).") from error
    if shutil.which(words[0]) is None:
        raise ValueError(f"--launch begins with {words[0]!r}; it must be a program that can be started here.")
    return words


def _check_same(run: Path, config: TrainConfig) -> None:
    """Raises ValueError if a run that is there already was trained with other options that its loss depends on."""
    if not (run / "config.yaml").exists():
        return
    earlier = yaml.safe_load((run / "config.yaml").read_text())
    for key, (old, new) in changed_keys(earlier, to_dict(config)).items():
        if key.startswith(DECISIVE) and key != RATE_KEY.removeprefix("--"):
            raise ValueError(f"{run} was trained with {key} {old}, now it is {new}; name another folder for --runs.")


def _final_loss(run: Path, rate: float, config: TrainConfig, launch: list[str], rest: list[str]) -> float:
    """Trains one rate to its end, if that was not done before. Raises Stopped, or ValueError for any other end."""
    steps = config.schedule.steps
    _check_same(run, config)
    now = standing(run)
    if (now.status, now.step) != ("finished", steps) and not now.diverged:
        code = subprocess.run([*launch, *rest, "--run", str(run), RATE_KEY, f"{rate:g}"]).returncode
        now = standing(run)
        if not now.diverged and (code == STOPPED or now.status == "stopped"):
            raise Stopped(f"{run} was stopped")
        if not now.diverged and now.status != "finished":
            raise ValueError(f"{run} ended with code {code} before it was finished; see its messages above.")
    if now.diverged:
        return inf
    rows = read_rows(run / METRICS_FILE)
    losses = [row["valid_loss"] for row in rows if row.get("valid_loss") is not None and row["step"] == steps]
    return float(losses[-1]) if losses else inf


def _report(tried: list[Tried], folder: Path) -> None:
    """search.json, and the table."""
    best = min(tried, key=lambda one: one.valid_loss)
    if not isfinite(best.valid_loss):
        raise ValueError(
            f"all {len(tried)} rates down to {tried[-1].rate:g} diverged; try --first {tried[-1].rate / 10:g}."
        )
    rows = [{"rate": one.rate, "valid_loss": one.valid_loss if isfinite(one.valid_loss) else None} for one in tried]
    write_json(folder / SEARCH_FILE, {"best_rate": best.rate, "tried": rows})
    print("\n     rate  final validation loss, nats/token")
    for one in tried:
        said = f"{one.valid_loss:.4f}" if isfinite(one.valid_loss) else "diverged"
        print(f"{one.rate:9g}  {said}{'  best' if one is best else ''}")
    edge = " (the last one tried: a lower --last may find a better)" if best is tried[-1] else ""
    print(f"\n{RATE_KEY} {best.rate:g}{edge}")
