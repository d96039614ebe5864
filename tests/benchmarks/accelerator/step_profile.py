"""Where a step of iGPT-L spends its time on the device."""

import statistics
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from pipeline.model import attention
from tests.benchmarks.accelerator.common import CUDA, OUT, case_of, start_alone, synchronize, use_fastest_attention
from tests.benchmarks.accelerator.report import Row, known
from tests.benchmarks.accelerator.speed import STEPS, close, fit, ours, rate_row

MEASURED = 8
"""Steps, the last of which is profiled."""
KINDS = (
    ("Triton", ("triton",)),  # first: their names contain those of the operators that they fuse
    ("attention", ("flash", "fmha", "sdpa")),
    ("communication", ("nccl",)),
    ("optimizer", ("multi_tensor_apply", "adam")),
    ("matrix products", ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk")),
    ("copies", ("memcpy", "memset", "copy", "cat")),
)
"""Parts of the names of kernels, the first that matches counts; what none matches is "other"."""


def train_l() -> Iterator[Row | str]:
    """Eight steps of 16 images, one of them profiled."""
    case = case_of("l")
    start_alone()
    seconds = use_fastest_attention(case)
    yield known("train l: attention", attention.describe(seconds) if seconds else "as it is")
    began = time.perf_counter()
    case, step = fit(case, ours)
    synchronize()
    yield known("train l: s to build, compile and make the first step", time.perf_counter() - began)
    times = [_seconds(step) for _ in range(MEASURED - 1)]
    yield STEPS
    yield from rate_row("iGPT-L", "ours, ZeRO-1, median of 7 steps", case, case.images / statistics.median(times))
    yield known("train l: ms a step", 1000 * statistics.median(times))
    yield known("train l: slowest step, ms", 1000 * max(times))
    if CUDA:
        yield known("train l: peak memory, GB", torch.cuda.max_memory_allocated() / 1e9)
        yield known("train l: reserved memory, GB", torch.cuda.max_memory_reserved() / 1e9)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
    with profile(activities=kinds) as window:
        wall = _seconds(step)
    close(step)
    by = "self_device_time_total" if CUDA else "self_cpu_time_total"
    (OUT / "profile.txt").write_text(window.key_averages().table(sort_by=by, row_limit=80, max_name_column_width=120))
    yield "\n| a step of iGPT-L | ms | share |\n|---|---|---|"
    for name, spent in shares(spans(window.events()), wall).items():
        yield f"| {name} | {1000 * spent:.1f} | {spent / wall:.1%} |"
        yield known(f"train l: {name}, ms", f"{1000 * spent:.1f} ({spent / wall:.1%})")


def _seconds(step: Any) -> float:
    synchronize()
    began = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - began


def spans(events: Iterable[Any]) -> list[tuple[str, float, float]]:
    """Name, start and end in seconds of each kernel and copy of the device; on a CPU, of the outermost operators.

    Annotations, which the profiler shows on the device too, cover the same kernels again and do not count.
    """
    found = []
    for event in events:
        on_device = event.device_type != DeviceType.CPU
        counts = on_device and not getattr(event, "is_user_annotation", False) if CUDA else event.cpu_parent is None
        if counts:
            found.append((event.name, event.time_range.start / 1e6, event.time_range.end / 1e6))
    return found


def shares(found: list[tuple[str, float, float]], wall: float) -> dict[str, float]:
    """Seconds by kind of kernel, and of the idle device: those of `wall` that no span covers."""
    by_kind = dict.fromkeys([*(kind for kind, _ in KINDS), "other"], 0.0)
    covered, end = 0.0, float("-inf")
    for name, start, stop in sorted(found, key=lambda span: span[1]):
        by_kind[kind_of(name)] += stop - start
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return by_kind | {"idle": max(0.0, wall - covered)}


def kind_of(kernel: str) -> str:
    """The kind of a kernel by its name."""
    lower = kernel.lower()
    return next((kind for kind, words in KINDS if any(word in lower for word in words)), "other")
