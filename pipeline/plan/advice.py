"""Advice for a run that ran out of memory: the planned peak of its layout, and a layout that needs less."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline import costs
from pipeline.config import TrainConfig
from pipeline.plan.hardware import CPU, hardware_of
from pipeline.plan.layouts import Cluster, Layout, alternatives, fits, lay_out

if TYPE_CHECKING:
    from transformers import GPT2Config

CLEARLY_SMALLER = 0.9
"""A layout is proposed if its planned peak is at most this fraction of that of the layout that ran out of memory."""
RANKS_PER_NODE = 8
"""As `plan` assumes by default."""
TABLE = "a100-80gb"
"""The accelerator whose speed orders the layouts of one that has no entry."""


def cluster_of(device_name: str | None, memory_bytes: float, ranks: int) -> Cluster:
    """The cluster of a run, as it knows it.

    device_name: that of torch.cuda.get_device_name(), None for a CPU. memory_bytes: as the driver reports it; 0 if
    unknown.
    """
    known = CPU if device_name is None else costs.find_accelerator(device_name)
    similar = known or costs.ACCELERATORS[TABLE]
    named = known or replace(similar, name=str(device_name), memory_bytes=memory_bytes)
    if device_name is not None and memory_bytes:  # a MIG instance has a part of the memory of the GPU it is named after
        named = replace(named, memory_bytes=min(named.memory_bytes, memory_bytes))
    return Cluster(named, ranks, RANKS_PER_NODE, hardware_of(similar))


def smaller_layout(planned: Layout, model: GPT2Config, cluster: Cluster) -> Layout | None:
    """The fastest layout of the same run that fits and has a clearly lower peak than `planned`, or None.

    Of layouts that are equally fast to two digits, the one with the largest micro-batch.
    """
    limit = CLEARLY_SMALLER * planned.memory.peak
    smaller = [
        layout
        for layout in alternatives(planned.config, model, cluster)
        if layout.memory.peak <= limit and fits(layout, cluster)
    ]
    return min(smaller, key=_slowness, default=None)


def _slowness(layout: Layout) -> tuple[float, int]:
    return float(f"{layout.seconds:.1e}"), -layout.config.batch.micro_size


def memory_advice(config: TrainConfig, model: GPT2Config, cluster: Cluster) -> str:
    """A sentence: the planned peak of the run's layout, and the options of a layout that needs less."""
    planned = lay_out(config, model, cluster)
    accelerator = cluster.accelerator
    of = "" if cluster.on_cpu else f" of {accelerator.name}'s {accelerator.memory_bytes / 1e9:g} GB"
    needs = f"by plan's estimate {planned.name()} needs {planned.memory.peak / 1e9:.2f} GB{of} per rank"
    smaller = smaller_layout(planned, model, cluster)
    if smaller is None:
        return f"{needs}, and no layout on {cluster.ranks} ranks needs clearly less; use more ranks."
    return f"{needs}; the fastest that needs less is {smaller.overrides(config)}: {smaller.memory.peak / 1e9:.2f} GB."
