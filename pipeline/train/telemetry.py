"""What a run tells: metrics.jsonl, TensorBoard, and a line on the console. Only the first rank tells it."""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from data_prep.files import written_aside

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
SAMPLES_FOLDER = "samples"
CONSOLE_SECONDS = 5.0


class Telemetry:
    """What the ranks but the first tell: nothing."""

    def training_step(self, row: dict[str, Any]) -> None:
        """Records one optimizer step; row is metrics.jsonl's object, in its order."""

    def validation(self, row: dict[str, Any]) -> None:
        """Records a validation; row has step, images and valid_loss."""

    def samples(self, step: int, grid: np.ndarray) -> None:
        """Records completions: uint8 (H, W, 3), as a PNG in the run and a picture in TensorBoard."""

    def flush(self) -> None:
        """Pushes everything to disk, before a checkpoint says that these steps are done."""

    def close(self) -> None:
        """Flushes and closes the files."""


class RunTelemetry(Telemetry):
    """Writes a run's rows; a resumed run goes on after `step`, and what an interrupted one wrote beyond is dropped."""

    def __init__(self, run: Path, step: int, steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._run, self._steps = run, steps
        drop_rows_after(run / METRICS_FILE, step)
        for picture in (run / SAMPLES_FOLDER).glob("step-*.png"):
            if int(picture.stem.removeprefix("step-")) > step:
                picture.unlink()
        self._rows: TextIO = (run / METRICS_FILE).open("a")
        self._board = SummaryWriter(str(run / TENSORBOARD_FOLDER), purge_step=step + 1)
        self._last_line = 0.0

    def training_step(self, row: dict[str, Any]) -> None:
        self._write(row)
        for key, value in row.items():
            if key != "step" and value is not None:
                self._board.add_scalar(f"train/{key}", float(value), row["step"])
        now = time.monotonic()
        if now - self._last_line >= CONSOLE_SECONDS or row["step"] in (1, self._steps):
            self._last_line = now
            print(self._line(row), flush=True)

    def validation(self, row: dict[str, Any]) -> None:
        self._write(row)
        self._board.add_scalar("valid/loss", row["valid_loss"], row["step"])
        print(f"step {row['step']}: validation loss {row['valid_loss']:.4f} nats/token", flush=True)

    def samples(self, step: int, grid: np.ndarray) -> None:
        from PIL import Image

        path = self._run / SAMPLES_FOLDER / f"step-{step:08d}.png"
        with written_aside(path) as aside:
            Image.fromarray(grid).save(aside, format="png")
        self._board.add_image("completions", grid, step, dataformats="HWC")

    def flush(self) -> None:
        self._rows.flush()
        os.fsync(self._rows.fileno())
        self._board.flush()

    def close(self) -> None:
        self.flush()
        self._rows.close()
        self._board.close()

    def _write(self, row: dict[str, Any]) -> None:
        self._rows.write(json.dumps(row) + "\n")
        self._rows.flush()

    def _line(self, row: dict[str, Any]) -> str:
        left = (self._steps - row["step"]) * row["images"] / row["step"] / row["images_per_second"]
        mfu = "" if row["mfu"] is None else f" | MFU {row['mfu']:.1%}"
        return (
            f"step {row['step']:>{len(str(self._steps))}}/{self._steps} | loss {row['loss']:.4f} | "
            f"rate {row['learning_rate']:.2e} | norm {row['grad_norm']:.3f} | "
            f"{row['images_per_second']:.1f} images/s | {row['tokens_per_second']:,.0f} tokens/s{mfu} | "
            f"waited {row['data_wait']:.1%} for data | {_duration(left)} left"
        )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def drop_rows_after(path: Path, step: int) -> None:
    """Rewrites metrics.jsonl without rows beyond `step`, and without a last line that a kill cut short."""
    if not path.exists():
        return
    with written_aside(path) as aside, path.open() as old, aside.open("w") as new:
        for line in old:
            if line.endswith("\n") and _step_of(line) <= step:
                new.write(line)


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return sys.maxsize


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: allocated on the accelerator, or resident on the host."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class StepClock:
    """Times one step and how long of it the loop waited for data."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._waited = 0.0

    def wait_for(self, read: Callable[[], np.ndarray]) -> np.ndarray:
        """Runs `read` and counts its time as waiting."""
        start = time.perf_counter()
        tokens = read()
        self._waited = time.perf_counter() - start
        return tokens

    def lap(self) -> tuple[float, float]:
        """Seconds since the last lap, and the share of them spent waiting."""
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        return seconds, self._waited / seconds

    def restart(self) -> None:
        """Leaves out what was not training: validation, samples, a save."""
        self._start = time.perf_counter()
