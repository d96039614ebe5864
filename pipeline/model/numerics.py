"""torch's global settings of exactness: deterministic kernels, and fp32 without TF32; and where bf16 is slow."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

CUBLAS_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
"""The environment variable without which cuBLAS may sum in another order on each call, and its value."""


def use_deterministic_kernels() -> None:
    """Makes every following operation of this process deterministic; torch raises RuntimeError at one that can't be.

    Call it before the first matrix product on CUDA, which reads the environment. FlashAttention's backward pass then
    adds in a fixed order; cuDNN's attention has no such pass and is switched off.
    """
    os.environ.setdefault(*CUBLAS_WORKSPACE)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it writes every new tensor once more
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_cudnn_sdp(False)


def bf16_is_slow(device: torch.device) -> bool:
    """Whether the device is a processor for which oneDNN has no bf16 kernels: on x86, one without AVX-512.

    torch's own kernels then convert each number. On an AMD EPYC with AVX2, a step of the demo took 5.4 times as long in
    bf16 as in fp32, and a step of 8 blocks of width 96 about 9 times.
    """
    if device.type != "cpu":
        return False
    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def any_kernels() -> Iterator[None]:
    """Allows nondeterministic kernels for a while, for what training does not depend on."""
    asked = torch.are_deterministic_algorithms_enabled()
    try:
        if asked:
            torch.use_deterministic_algorithms(False)
        yield
    finally:
        if asked:
            torch.use_deterministic_algorithms(True)


@contextmanager
def without_tf32() -> Iterator[None]:
    """fp32 convolutions and matrix products on CUDA are computed in fp32; torch's default for convolutions is TF32."""
    settings = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision
