"""Chooses the kernel of attention, by time measured at the run's own shape: FlashAttention's or cuDNN's on CUDA,
FlashAttention's or that of cpu_attention.py on CPU."""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.benchmark import Timer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pipeline.model.cpu_attention import ROWS, BlockedAttention, attend

FLASH, CUDNN, BLOCKED = SDPBackend.FLASH_ATTENTION.name, SDPBackend.CUDNN_ATTENTION.name, "BLOCKED_ATTENTION"
WRONG_CUDNN = 91500
"""The newest cuDNN whose attention is wrong at lengths that are not multiples of 128 (pytorch issue 169849)."""
SECONDS_EACH = 0.1
"""Minimum seconds of measurement for each kernel on CPU."""
DEVICE_PASSES = 10
"""Measured passes of each kernel on CUDA."""
WAIT_CYCLES = 10**8
"""About 60 ms of a GPU's clock, in which the host launches the measured passes."""
CLEARLY_FASTER = 0.8
"""BLOCKED is used if it takes less than this share of FlashAttention's time: noise must not change a run's bits."""
BLOCKED_POSITIONS = 2 * ROWS
"""Fewest positions at which BLOCKED is measured: with one block of queries it computes the whole matrix."""
CPU_IMAGES, CPU_TURNS = 4, (3, 20)
"""On CPU: images measured at most, and how many turns of both kernels at least and at most."""


@dataclass(frozen=True)
class AttentionShape:
    """The shape of one block's attention over a micro-batch."""

    images: int
    heads: int
    positions: int
    head_width: int
    causal: bool


def candidates(
    shape: AttentionShape, device: str, cudnn_version: int | None, deterministic: bool = False
) -> tuple[str, ...]:
    """The kernels to measure for attention in bf16 without dropout, by name; none if only one can be used.

    deterministic: excludes cuDNN, which has no deterministic backward pass, and on CPU a choice by time.
    """
    if device == "cuda":
        return (FLASH, CUDNN) if cudnn_is_right(cudnn_version) and not deterministic else (FLASH,)
    return (FLASH, BLOCKED) if device == "cpu" and not deterministic and shape.positions >= BLOCKED_POSITIONS else ()


def cudnn_is_right(version: int | None) -> bool:
    """Whether the attention of this version of cuDNN may be used."""
    return version is not None and version > WRONG_CUDNN


def measure_named(shape: AttentionShape, names: Sequence[str], device: torch.device) -> dict[str, float]:
    """As `measure`, by names of `candidates`; seconds of the process's CPU time for those on CPU."""
    if BLOCKED not in names:
        return measure(shape, [SDPBackend.__members__[name] for name in names], device)
    some = replace(shape, images=min(shape.images, CPU_IMAGES))
    flash, blocked = _passes(some, device), _passes(some, device, blocked=True)
    flash(), blocked()
    seconds, turns, end = {FLASH: float("inf"), BLOCKED: float("inf")}, 0, time.process_time() + 2 * SECONDS_EACH
    while turns < CPU_TURNS[0] or (turns < CPU_TURNS[1] and time.process_time() < end):
        for name, run in ((FLASH, flash), (BLOCKED, blocked)):  # in turns: other work slows both
            start = time.process_time()
            run()
            seconds[name] = min(seconds[name], time.process_time() - start)
        turns += 1
    return {name: second * shape.images / some.images for name, second in seconds.items()}


def measure(shape: AttentionShape, kernels: Sequence[SDPBackend], device: torch.device) -> dict[str, float]:
    """Seconds of a forward and backward pass in bf16, by name; kernels that reject the shape, and a wrong cuDNN, are
    absent."""
    seconds = {}
    for kernel in kernels:
        if kernel == SDPBackend.CUDNN_ATTENTION and not cudnn_is_right(torch.backends.cudnn.version()):
            continue
        run = _passes(shape, device)
        with suppress(RuntimeError), sdpa_kernel(kernel):  # "No available kernel"
            run()
            seconds[kernel.name] = _device_seconds(run) if device.type == "cuda" else _host_seconds(run)
    return seconds


def _host_seconds(run: Callable[[], None]) -> float:
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=SECONDS_EACH).median


def _device_seconds(run: Callable[[], None]) -> float:
    """The median over some passes. They are queued behind a kernel that only waits: the time in which the host launches
    kernels, which is longer than that of small ones, does not count, as in training, where the host is ahead."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(DEVICE_PASSES + 1)]
    torch.cuda._sleep(WAIT_CYCLES)
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(first.elapsed_time(last) for first, last in pairwise(events)) / 1000


def _passes(shape: AttentionShape, device: torch.device, blocked: bool = False) -> Callable[[], None]:
    """A forward and backward pass over strided views of packed queries, keys and values, as a block passes them."""
    width = shape.heads * shape.head_width
    size = (shape.images, shape.positions, 3 * width)
    packed = torch.randn(size, device=device, dtype=torch.bfloat16, requires_grad=True)  # (B, T, 3 * D)

    def run() -> None:
        packed.grad = None
        queries, keys, values = (
            part.unflatten(2, (shape.heads, shape.head_width)).transpose(1, 2) for part in packed.split(width, dim=2)
        )  # (B, H, T, d)
        if blocked:
            mixed = BlockedAttention.apply(queries, keys, values, shape.head_width**-0.5, shape.causal)
        else:
            mixed = scaled_dot_product_attention(queries, keys, values, is_causal=shape.causal)
        mixed.transpose(1, 2).contiguous().sum().backward()

    return run


def fastest(seconds: dict[str, float]) -> str:
    """The name of the kernel to use: a function of the measurement alone, so that a resumed run uses the same."""
    name = min(seconds, key=lambda name: seconds[name])
    if name == BLOCKED and seconds[BLOCKED] > CLEARLY_FASTER * seconds.get(FLASH, float("inf")):
        return FLASH
    return name


def use_fastest(seconds: dict[str, float]) -> None:
    """Selects the fastest measured kernel in this process; without a measurement, torch's own on CPU.

    On CUDA FlashAttention stays the second choice, for shapes that cuDNN rejects. Other kernels remain available for
    attention with a mask.
    """
    name = fastest(seconds) if seconds else FLASH
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend if name == BLOCKED else sdpa_attention_forward
    if seconds and name != BLOCKED:
        torch.backends.cuda.enable_flash_sdp(True)
        torch.backends.cuda.enable_cudnn_sdp(name == CUDNN)
        # Enabled kernels are tried in this order. torch's own has mem-efficient attention before cuDNN's, and on Hopper
        # cuDNN's before FlashAttention from the first call on: a kernel that must not be used has to be disabled too.
        first = list(dict.fromkeys([int(SDPBackend.__members__[name]), int(SDPBackend.FLASH_ATTENTION)]))
        rest = [kernel for kernel in torch._C._get_sdp_priority_order() if kernel not in first]
        torch._C._set_sdp_priority_order([*first, *rest])


def describe(seconds: dict[str, float]) -> str:
    """The measurement in one line, the kernel in use first."""
    used = fastest(seconds)
    order = sorted(seconds, key=lambda name: (name != used, seconds[name]))
    words = [f"{name} {1000 * seconds[name]:.2f} ms" for name in order]
    if used == FLASH and BLOCKED in seconds:
        used = f"{used} is used, unless {BLOCKED} takes {1 - CLEARLY_FASTER:.0%} less"
    else:
        used = f"{used} is used"
    return f"{', '.join(words)} per block and micro-batch, forward and backward, as measured; {used}"
