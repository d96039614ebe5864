"""The line that a person reads every five seconds: the speed since the line before, and the time to the end."""

import time
from math import log
from typing import Any

from data_prep.common.logs import TIME
from pipeline.train.monitor.summary import Throughput
from pipeline.train.setup import Inputs

CONSOLE_SECONDS = 5.0
"""Seconds between two lines."""
FAR_SECONDS = 1e10
"""More than 300 years: ends that are later are not computed."""
UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


class Console:
    """Sums what the steps since the last line took. Rank 0 uses it."""

    def __init__(self, throughput: Throughput, inputs: Inputs, step: int) -> None:
        """step: the last one before this start."""
        batch, self._steps = inputs.config.batch, inputs.config.schedule.steps
        self._throughput, self._batch, self._epoch_images = throughput, batch, inputs.sets.train_images
        self.uniform_loss = log(inputs.model_config.colors)
        self._images_left = batch.images_after(self._steps) - batch.images_after(min(step, self._steps))
        self._began, self._last_line, self._first = time.monotonic(), 0.0, step
        self._images, self._count, self._seconds, self._waited = 0, 0, 0.0, 0.0

    def line(
        self, row: dict[str, Any], seconds: float, pauses: float, epochs: dict[str, float] | None = None
    ) -> str | None:
        """The line after a step, if one is due; at the first and the last step it is.

        row: of the step, as in metrics.jsonl; seconds: of the step; pauses: seconds so far in this start for
        validation, samples and saves; epochs: of each set of a mixture.
        """
        size = self._batch.size_at(row["step"])
        self._images_left -= size
        self._images, self._count = self._images + size, self._count + 1
        self._seconds, self._waited = self._seconds + seconds, self._waited + row["data_wait"] * seconds
        now = time.monotonic()
        if now - self._last_line < CONSOLE_SECONDS and row["step"] not in (1, self._steps):
            return None
        self._last_line = now
        line = self._describe(row, pauses, now - self._began, epochs or {})
        self._images, self._count, self._seconds, self._waited = 0, 0, 0.0, 0.0
        return line

    def _describe(self, row: dict[str, Any], pauses: float, elapsed: float, epochs: dict[str, float]) -> str:
        step, tokens = row["step"], self._throughput.tokens_per_image
        rates = self._throughput.rates(self._images, self._seconds)
        pause = pauses / (step - self._first)  # seconds a step, of all steps of this start: pauses come seldom
        left = self._images_left / rates["images_per_second"] + (self._steps - step) * pause
        epoch = f"epoch {row['images'] / self._epoch_images:.2f}"
        if epochs:
            epoch = "epochs " + ", ".join(f"{name} {read:.2f}" for name, read in epochs.items())
        end = time.strftime(TIME, time.localtime(time.time() + min(left, FAR_SECONDS)))
        return (
            f"step {step:>{len(str(self._steps))}}/{self._steps} | loss {row['loss']:.4f} | "
            f"lr {row['learning_rate']:.2e} | norm {row['grad_norm']:.3f} | "
            f"{self._seconds / self._count:.3g} s/step | "
            f"{rates['images_per_second']:.1f} images/s | {rates['tokens_per_second']:,.0f} tokens/s | "
            f"MFU {rates['mfu']:.1%} | waited {self._waited / self._seconds:.1%} for data | "
            f"{short(row['images'] * tokens)} of {short((row['images'] + self._images_left) * tokens)} tokens | "
            f"{epoch} | {duration(elapsed)} elapsed | "
            f"ends {end} | {duration(left)} left"
        )


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 26:03:09."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def short(number: float) -> str:
    """Three digits and a unit: 12.3M."""
    for size, unit in UNITS:
        if number >= 0.9995 * size:  # 999.5 would be rounded to 1e+03
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
