"""Records a run: metrics.jsonl, TensorBoard, and the console lines. Only rank 0 records."""

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeVar

import numpy as np

from data_prep.common.files import atomic_write
from pipeline.checkpoint.metrics_log import (
    METRICS_FILE,
    SKIPPED_FILE,
    TENSORBOARD_FOLDER,
    drop_rows_after,
    read_backwards,
    read_last_row,
    to_line,
)
from pipeline.distributed import Ranks, raise_on_all_ranks
from pipeline.train.health.step_filter import DESCRIPTIONS
from pipeline.train.monitor.console import Console
from pipeline.train.probe import report

logger = logging.getLogger(__name__)

T = TypeVar("T")

SAMPLES_FOLDER = "samples"
SAMPLE_NAME = re.compile(r"step-(\d{8,})\.png")


def _on_first_rank(method: Callable[..., None]) -> Callable[..., None]:
    """Skips the method on other ranks, and after a failure; stores an OSError in `failure`."""

    @wraps(method)
    def guarded(self: "Telemetry", *arguments: Any) -> None:
        if self.records and self.failure is None:
            try:
                method(self, *arguments)
            except OSError as error:
                self.failure = error

    return guarded


class Telemetry:
    """Writes a run's rows. A resumed run continues after `step`, and deletes rows and samples of later steps."""

    def __init__(self, run: Path, step: int, console: Console, records: bool) -> None:
        """records: False on ranks that record nothing."""
        self.records = records
        self.failure: OSError | None = None
        """An error of writing. Not raised at once: the other ranks would wait for this one."""
        if not records:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._run, self._console = run, console
        for name in (METRICS_FILE, SKIPPED_FILE):
            drop_rows_after(run / name, step)
        for sample in (run / SAMPLES_FOLDER).glob("step-*.png"):
            number = SAMPLE_NAME.fullmatch(sample.name)  # a user may have put others there
            if number is not None and int(number[1]) > step:
                sample.unlink()
        self._rows: TextIO = (run / METRICS_FILE).open("a")
        self._board = SummaryWriter(str(run / TENSORBOARD_FOLDER), purge_step=step + 1)

    def raise_failure(self) -> None:
        """Raises on every rank if rank 0 could not write; all ranks must call it."""
        with raise_on_all_ranks():
            if self.failure is not None:
                raise self.failure

    @_on_first_rank
    def training_step(self, row: dict[str, Any], seconds: float, pauses: float, epochs: dict[str, float]) -> None:
        """Records an optimizer step.

        row: the object for metrics.jsonl, keys in order; seconds: of the step; pauses: seconds so far in this start
        for validation, samples and saves; epochs: of each set of a mixture.
        """
        self._write(row)
        for key, value in row.items():
            if key != "step" and isfinite(value):
                self._board.add_scalar(f"train/{key}", float(value), row["step"])
        for name, epoch in epochs.items():
            self._board.add_scalar(f"train/epoch/{name}", epoch, row["step"])
        self.log(self._console.line(row, seconds, pauses, epochs))

    @_on_first_rank
    def validation(self, row: dict[str, Any]) -> None:
        """Records a validation; row: step, images, valid_loss, with averaged weights valid_loss_ema, for a mixture
        valid_loss_by_set."""
        self._write(row)
        by_set = row.get("valid_loss_by_set", {})
        self._board.add_scalar("valid/loss", row["valid_loss"], row["step"])
        average = ""
        if "valid_loss_ema" in row:
            self._board.add_scalar("valid/loss_ema", row["valid_loss_ema"], row["step"])
            average = f", {row['valid_loss_ema']:.4f} with the average of the weights"
        for name, loss in by_set.items():
            self._board.add_scalar(f"valid/loss/{name}", loss, row["step"])
        each = "".join(f"; {name} {loss:.4f}" for name, loss in by_set.items())
        logger.info(
            f"step {row['step']}: validation loss {row['valid_loss']:.4f} nats/token{average} (a uniform guess: "
            f"{self._console.uniform_loss:.4f}){each}"
        )

    @_on_first_rank
    def probe(self, row: dict[str, Any], test_images: int) -> None:
        """Records a probe; row: step, images, probe_accuracy, probe_layer, probe_accuracy_by_layer.

        test_images: on how many the accuracies were measured.
        """
        self._write(row)
        step, by_layer = row["step"], row["probe_accuracy_by_layer"]
        scalars = {"accuracy": row["probe_accuracy"], "best_layer": row["probe_layer"]}
        scalars |= {f"layer/{layer:02}": accuracy for layer, accuracy in enumerate(by_layer)}
        for name, value in scalars.items():
            self._board.add_scalar(f"probe/{name}", value, step)
        self._board.add_image("probe/accuracy_by_depth", report.figure(row), step, dataformats="HWC")
        logger.info(f"step {step}: {report.sentence(row)}")
        newest = read_backwards(self._run / METRICS_FILE, "probe_accuracy")
        if (message := report.warning(newest, test_images)) is not None:
            logger.warning(message)

    @_on_first_rank
    def skipped_step(self, row: dict[str, Any]) -> None:
        """Records a skipped step, or an applied loss spike; row: the step's row with its reason and images."""
        with (self._run / SKIPPED_FILE).open("a") as rows:
            rows.write(to_line(row))
        what = "applied" if row["applied"] else "skipped"
        logger.warning(
            f"step {row['step']} {what}: {DESCRIPTIONS[row['reason']]}; its images are listed in {rows.name}"
        )

    @_on_first_rank
    def log(self, message: str | None) -> None:
        """Logs a message, unless it is None."""
        if message is not None:
            logger.info(message)

    @_on_first_rank
    def samples(self, step: int, grid: np.ndarray) -> None:
        """Records completions, uint8 (H, W, 3), as a PNG in the run and in TensorBoard."""
        from PIL import Image

        path = _sample(self._run, step)
        with atomic_write(path) as temporary:
            Image.fromarray(grid).save(temporary, format="png")
        self._board.add_image("completions", grid, step, dataformats="HWC")

    @_on_first_rank
    def flush(self) -> None:
        """Flushes everything to disk, before a checkpoint records these steps as done."""
        self._rows.flush()
        os.fsync(self._rows.fileno())
        self._board.flush()

    @_on_first_rank
    def close(self) -> None:
        """Flushes and closes the files."""
        self.flush()
        self._rows.close()
        self._board.close()

    def _write(self, row: dict[str, Any]) -> None:
        self._rows.write(to_line(row))
        self._rows.flush()


def _sample(run: Path, step: int) -> Path:
    """The completions of a step."""
    return run / SAMPLES_FOLDER / f"step-{step:08d}.png"


def open_telemetry(run: Path, step: int, console: Console, ranks: Ranks) -> Telemetry:
    """This rank's Telemetry, for a run that continues after `step`. If rank 0 can't write, every rank raises."""
    with raise_on_all_ranks():
        return Telemetry(run, step, console, records=ranks.is_first)


class EvaluatedStep(NamedTuple):
    """Whether a step was validated, sampled, and probed."""

    validated: bool = False
    sampled: bool = False
    probed: bool = False


NOT_EVALUATED = EvaluatedStep()


def evaluated(run: Path, step: int) -> EvaluatedStep:
    """What a run has recorded of the evaluation of its last step."""
    validated, probed = (
        (read_last_row(run / METRICS_FILE, key) or {}).get("step") == step for key in ("valid_loss", "probe_accuracy")
    )
    return EvaluatedStep(validated, _sample(run, step).exists(), probed)


class StepClock:
    """Times each step, and how long the loop waited for data in it."""

    def __init__(self) -> None:
        self._start = self._waited = self.pauses = 0.0

    def start(self) -> None:
        """Starts the first step."""
        self._start = time.perf_counter()

    def wait_for(self, read: Callable[[], T]) -> T:
        """Runs `read` and counts its time as waiting for data."""
        start = time.perf_counter()
        result = read()
        self._waited += time.perf_counter() - start
        return result

    def lap(self) -> tuple[float, float]:
        """Seconds since the last lap, and seconds of these spent waiting for data."""
        now = time.perf_counter()
        seconds, waited = now - self._start, self._waited
        self._start, self._waited = now, 0.0
        return seconds, waited

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the body from the step's time: validation, samples, a save."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self._start += seconds
        self.pauses += seconds
