"""Turns an error of allocation into advice."""

import re

import torch

from pipeline.plan.advice import cluster_of, memory_advice
from pipeline.train.setup import Inputs

MESSAGES = ("out of memory", "can't allocate memory", "status_alloc_failed")
"""How CUDA, NCCL, cuBLAS, cuDNN and torch's allocator of host memory report it in a RuntimeError."""
WANTED = re.compile(r"tried to allocate ([\d.]+ \w+)", re.IGNORECASE)


class OutOfMemory(RuntimeError):
    """A rank ran out of memory; the message advises what to change. Other ranks may still wait for this one."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory could not be allocated, on the accelerator or the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in MESSAGES)


def with_advice(error: BaseException, inputs: Inputs) -> OutOfMemory | None:
    """An error of allocation as one sentence with the plan's figures for this run; None for any other error."""
    if not is_out_of_memory(error):
        return None
    device, name, size = inputs.ranks.device, None, 0.0
    if device.type == "cuda":
        name, size = torch.cuda.get_device_name(device), float(torch.cuda.get_device_properties(device).total_memory)
    found = WANTED.search(str(error))
    wanted = f" ({found[1]} could not be allocated)" if found else ""
    advice = memory_advice(inputs.config, inputs.model_config, cluster_of(name, size, inputs.ranks.count))
    return OutOfMemory(f"out of memory{wanted}: {advice}")
