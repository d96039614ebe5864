"""Memory of a process: the allocator's default setting, and peaks for the log."""

import os
import resource
from typing import NamedTuple

import torch

ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Variables that torch reads once, when it first uses an accelerator; an earlier one hides a later one."""


class PeakMemory(NamedTuple):
    """Peak memory in bytes."""

    used: int
    """Of tensors on the accelerator, or resident on the host."""
    reserved: int
    """What torch's allocator took from the accelerator for them; on the host, the same as `used`."""


def use_expandable_segments() -> None:
    """Lets torch's allocator grow its segments, so that they are not fragmented; a user's own setting wins.

    Call it before the first use of an accelerator.
    """
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def peak_memory(device: torch.device) -> PeakMemory:
    """The peaks of this process so far."""
    if device.type == "cuda":
        found = torch.cuda.memory_stats(device)
        return PeakMemory(*(int(found.get(f"{kind}_bytes.all.peak", 0)) for kind in ("allocated", "reserved")))
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return PeakMemory(resident, resident)


def peak_memory_table(device: torch.device, peaks: list[PeakMemory]) -> str:
    """The peaks of every rank, in one line."""
    used = ", ".join(f"{peak.used / 1e6:,.0f}" for peak in peaks)
    line = f"peak memory, MB, by rank: {used}"
    if device.type == "cuda":
        line += f"; reserved by the allocator: {', '.join(f'{peak.reserved / 1e6:,.0f}' for peak in peaks)}"
    return line
