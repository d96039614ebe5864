"""Chooses the kernel of scaled_dot_product_attention on CUDA: FlashAttention's or cuDNN's, whichever is faster at the
run's own shape."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.benchmark import Timer

CANDIDATES = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
SECONDS_EACH = 0.1
"""Minimum seconds of measurement for each kernel."""


@dataclass(frozen=True)
class AttentionShape:
    """The shape of one block's attention over a micro-batch."""

    images: int
    heads: int
    positions: int
    head_width: int
    causal: bool


def measure(shape: AttentionShape, kernels: Sequence[SDPBackend], device: torch.device) -> dict[str, float]:
    """Seconds of a forward and backward pass in bf16, by kernel name; kernels that reject the shape are absent."""
    size = (shape.images, shape.heads, shape.positions, shape.head_width)
    operands = [torch.randn(size, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    seconds = {}
    for kernel in kernels:
        timer = Timer(
            "attend(*operands, is_causal=causal).sum().backward()",
            globals={"attend": scaled_dot_product_attention, "operands": operands, "causal": shape.causal},
            num_threads=torch.get_num_threads(),
        )
        with suppress(RuntimeError), sdpa_kernel(kernel):  # "No available kernel"
            seconds[kernel.name] = timer.blocked_autorange(min_run_time=SECONDS_EACH).median
    return seconds


def use_fastest(seconds: dict[str, float]) -> None:
    """Selects the fastest measured kernel on CUDA; other kernels remain available for attention with a mask."""
    fastest = min(seconds, key=lambda name: seconds[name])
    torch.backends.cuda.enable_flash_sdp(fastest == SDPBackend.FLASH_ATTENTION.name)
    torch.backends.cuda.enable_cudnn_sdp(fastest == SDPBackend.CUDNN_ATTENTION.name)


def describe(seconds: dict[str, float]) -> str:
    """The measurement in one line, the fastest kernel first."""
    words = [f"{name} {1000 * seconds[name]:.2f} ms" for name in sorted(seconds, key=lambda name: seconds[name])]
    return f"{', '.join(words)} per block and micro-batch, forward and backward, as measured; the first is used"
