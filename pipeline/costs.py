"""Parameters and FLOPs of a model by formula, and the peak rates of accelerators that MFU is measured against.

FLOPs are counted as in PaLM's appendix B: a token's forward and backward pass takes 6 FLOPs for each parameter of a
matrix product, and 12 * L * T * D for attention, counted in full although half of it is masked. Recomputed activations
do not count. L layers, T positions, D width, V colors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import GPT2Config

STATE_BYTES, AVERAGE_BYTES = 12, 4
"""Bytes of a parameter in a checkpoint: fp32 master weight and two moments; and the weight's moving average."""


@dataclass(frozen=True)
class Accelerator:
    """An accelerator as its vendor specifies it: dense bf16 matrix products (no sparsity) and memory."""

    name: str
    bf16_flops: float
    """FLOP/s."""
    memory_bytes: float
    """As advertised, in decimal gigabytes; drivers report a little more or less."""
    pattern: str
    """Regular expression that torch.cuda.get_device_name() matches."""
    source: str
    float8: bool = False
    """Whether torchao supports float8 products on it: NVIDIA, compute capability 8.9 or later."""


@dataclass(frozen=True)
class Peak:
    """The peak rate that MFU is a fraction of."""

    flops: float
    """FLOP/s of one device."""
    source: str
    """Source of the number, for the log."""


TERA, GB = 1e12, 1e9

ACCELERATORS = {
    "a100-40gb": Accelerator("NVIDIA A100 40GB", 312 * TERA, 40 * GB, r"A100.*40GB", "NVIDIA A100 data sheet"),
    "a100-80gb": Accelerator("NVIDIA A100 80GB", 312 * TERA, 80 * GB, r"A100.*80GB", "NVIDIA A100 data sheet"),
    "h100-pcie-80gb": Accelerator(
        "NVIDIA H100 PCIe", 756 * TERA, 80 * GB, r"H100 PCIe", "NVIDIA H100 data sheet", float8=True
    ),
    "h100-80gb": Accelerator(
        "NVIDIA H100 SXM", 989 * TERA, 80 * GB, r"H100 80GB HBM3", "NVIDIA H100 data sheet", float8=True
    ),
    "h200-141gb": Accelerator(
        "NVIDIA H200 SXM", 989 * TERA, 141 * GB, r"\bH200(?! NVL)", "NVIDIA H200 data sheet", float8=True
    ),
    "b200-180gb": Accelerator(
        "NVIDIA B200", 2250 * TERA, 180 * GB, r"\bB200\b", "NVIDIA DGX B200 data sheet", float8=True
    ),
    "l40s-48gb": Accelerator("NVIDIA L40S", 362 * TERA, 48 * GB, r"L40S", "NVIDIA L40S data sheet", float8=True),
    "l4-24gb": Accelerator("NVIDIA L4", 121 * TERA, 24 * GB, r"\bL4\b", "NVIDIA L4 data sheet", float8=True),
    "a10-24gb": Accelerator("NVIDIA A10", 125 * TERA, 24 * GB, r"\bA10\b", "NVIDIA A10 data sheet"),
    "mi300x-192gb": Accelerator("AMD MI300X", 1307 * TERA, 192 * GB, r"MI300X", "AMD Instinct MI300X data sheet"),
}
"""Accelerators with published peaks; on any other device the peak is measured."""

MEASURE_SECONDS = 0.3


def state_bytes(ema_decay: float) -> int:
    """Bytes of a parameter in a run's checkpoint."""
    return STATE_BYTES + (AVERAGE_BYTES if ema_decay else 0)


def parameter_count(config: GPT2Config) -> int:
    """All parameters of a model of either block: embeddings of V + 1 tokens and T positions, L blocks, norm, head."""
    matrices = matmul_parameters(config)
    embeddings = (config.vocab_size + config.n_positions) * config.n_embd
    norms = (2 * config.n_layer + 1) * config.n_embd
    if config.block == "igpt":
        return matrices + embeddings + norms
    projection_biases = config.n_layer * (3 + 1 + 1) * config.n_embd + config.n_layer * mlp_width(config)
    return matrices + embeddings + 2 * norms + projection_biases


def matmul_parameters(config: GPT2Config) -> int:
    """Parameters of matrix products: 4 D^2 of a block's attention, its two MLP matrices, and the head."""
    width = config.n_embd
    return config.n_layer * (4 * width**2 + 2 * width * mlp_width(config)) + width * head_rows(config)


def head_rows(config: GPT2Config) -> int:
    """Scores of a position: the colors, with GPT-2's head also the start token."""
    return config.colors if config.block == "igpt" else config.vocab_size


def flops_per_token(config: GPT2Config) -> float:
    """FLOPs of a token's forward and backward pass: 6 x matmul parameters + 12 * L * T * D, full attention."""
    attention = 12 * config.n_layer * config.n_positions * config.n_embd
    return float(6 * matmul_parameters(config) + attention)


def mlp_width(config: GPT2Config) -> int:
    """Width of the inner layer of the MLP."""
    return config.n_inner if config.n_inner is not None else 4 * config.n_embd


def find_accelerator(device_name: str) -> Accelerator | None:
    """The entry of ACCELERATORS for the name of torch.cuda.get_device_name(); None if there is none."""
    return next((found for found in ACCELERATORS.values() if re.search(found.pattern, device_name)), None)


def device_peak(device: torch.device, precision: str) -> Peak:
    """The peak rate that MFU on `device` is measured against.

    For an accelerator of ACCELERATORS, its dense bf16 peak, also with fp32 and fp8, so that a faster precision shows as
    a higher MFU. For any other device, including CPUs, the rate of a large matrix product in `precision` (bf16 for
    fp8), measured in 0.3 s with the threads of this process.
    """
    import torch

    if device.type == "cuda":
        accelerator = find_accelerator(torch.cuda.get_device_name(device))
        if accelerator is not None:
            return Peak(accelerator.bf16_flops, f"{accelerator.name}, dense bf16, {accelerator.source}")
    name, dtype = ("fp32", torch.float32) if precision == "fp32" else ("bf16", torch.bfloat16)
    return Peak(measured_matmul_peak(dtype, device), f"{name} matrix product measured on this {device.type}")


def measured_matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the fastest square matrix product in 0.3 s, after a warm-up."""
    import torch
    from torch.utils.benchmark import Timer

    size = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)
    matrix = torch.randn(size, size, dtype=dtype, device=device, generator=generator)
    timer = Timer("matrix @ matrix", globals={"matrix": matrix}, num_threads=torch.get_num_threads())
    return 2 * size**3 / min(timer.blocked_autorange(min_run_time=MEASURE_SECONDS).times)


def bubble(stages: int, micro_batches: int) -> float:
    """The pipeline bubble: the fraction of a step in which a stage is idle, if all stages take equally long."""
    return (stages - 1) / (micro_batches + stages - 1)
