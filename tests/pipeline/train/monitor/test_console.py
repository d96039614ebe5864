"""The console line: averages since the line before, and the time to the end."""

import re
import time
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.layout import BatchConfig
from pipeline.schedule import ScheduleConfig
from pipeline.train.monitor import console
from pipeline.train.monitor.summary import Throughput

THROUGHPUT = Throughput(tokens_per_image=64, flops_per_token=1e6, peak_flops=1e10, peak_source="")


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock of the console."""
    clock = [100.0]
    monkeypatch.setattr(console, "time", SimpleNamespace(**vars(time)))
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(console.time, "time", lambda: 1e9)
    return clock


def console_after(step: int, batch: BatchConfig, steps: int = 100) -> console.Console:
    config = SimpleNamespace(batch=batch, schedule=ScheduleConfig(steps=steps, warmup_steps=0))
    inputs: Any = SimpleNamespace(
        config=config, sets=SimpleNamespace(train_images=400), model_config=SimpleNamespace(colors=512)
    )
    return console.Console(THROUGHPUT, inputs, step)


def row(step: int, images: int, data_wait: float = 0.0) -> dict[str, Any]:
    known = {"loss": 2.5, "learning_rate": 0.001, "grad_norm": 0.5, "images_per_second": 1e9, "mfu": 9.0}
    return {"step": step, "images": images, "data_wait": data_wait, **known}


def test_a_line_is_the_average_since_the_line_before(now: list[float]) -> None:
    lines = console_after(0, BatchConfig(global_size=8))
    first = lines.line(row(1, 8), 50.0, 0.0)  # it compiles
    assert first is not None
    assert "50 s/step" in first
    now[0] += 1
    assert lines.line(row(2, 16), 1.0, 0.0) is None
    now[0] += 5
    line = lines.line(row(3, 24, data_wait=0.2), 5.0, 0.0)
    end = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(1e9 + 97 * 3))
    assert line == (
        "step   3/100 | loss 2.5000 | lr 1.00e-03 | norm 0.500 | 3 s/step | 2.7 images/s | 171 tokens/s | MFU 1.7% | "
        "waited 16.7% for data | 1.54k of 51.2k tokens | epoch 0.06 | 0:00:06 elapsed | "
        f"ends {end} | 0:04:51 left"
    )


def test_the_time_left_is_that_of_the_batches_to_come(now: list[float]) -> None:
    """40 steps of 8 images, then the run is resumed with 128: as many images take 16 times as long."""
    lines = console_after(40, BatchConfig(global_size=128), steps=60)
    line = lines.line(row(41, 448), 1.28, 0.0)  # 100 images/s
    assert line is not None
    assert line.endswith("0:00:24 left"), line  # 19 steps of 128 images are 24.3 s
    assert f"{(448 + 19 * 128) * 64 / 1e3:.0f}k tokens" in line
    growing = console_after(0, BatchConfig(global_size=40, first_size=10, warmup_steps=8), steps=10)
    line = growing.line(row(1, 10), 10.0, 0.0)  # then 10, 2 x 20, 2 x 30, 4 x 40 images
    assert line is not None
    assert line.endswith("0:04:30 left"), line


def test_validation_and_saves_are_part_of_the_time_left(now: list[float]) -> None:
    """20 s for every 10 steps: 2 s a step more, however the steps since the last line fall."""
    lines = console_after(0, BatchConfig(global_size=8))
    for step in range(1, 26):
        now[0] += 1.0
        line = lines.line(row(step, 8 * step), 1.0, 20.0 * (step // 10)) or ""
        if line and step >= 20:
            left = [int(part) for part in re.findall(r"(\d+):(\d+):(\d+) left", line)[0]]
            assert 3600 * left[0] + 60 * left[1] + left[2] == pytest.approx((100 - step) * 3, rel=0.2)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (512, "512"), (999.4, "999"), (999_499, "999k"), (999_501, "1M"), (1.309e11, "131B"), (4.1e12, "4.1T")],
)
def test_large_numbers_have_three_digits_and_a_unit(number: float, text: str) -> None:
    assert console.short(number) == text
