"""The exponential moving average of the weights (ema.decay), on the fp32 partitions of each rank.

After each applied step: average = decay * average + (1 - decay) * weights. It starts equal to the initial weights.
There is no bias correction and no warm-up of the decay, as by default in timm: the initial weights' share after n steps
is decay^n. A skipped step changes nothing. Each rank averages the partition that it updates, so the average takes 4
bytes a parameter where the moments take 8, and is divided over the ranks as they are (with ZeRO-0 not at all).

The average is a state of DeepSpeed's optimizer beside Adam's moments, which neither torch nor DeepSpeed reads.
"""

from typing import Any

import torch
from torch import nn

from pipeline.checkpoint.fragments import EMA, StateReader
from pipeline.train.engine import deepspeed_internals as internals
from pipeline.train.engine.deepspeed_internals import Partition, RankCoordinates

CHUNK = 1 << 24
"""Elements exchanged at a time, through a copy of 64 MiB."""


@torch.no_grad()
def start(optimizer: Any, model: nn.Module, coordinates: RankCoordinates) -> None:
    """Starts the average at the current weights; arguments as for `partitions_of`."""
    for partition in internals.partitions_of(optimizer, model, coordinates):
        if "step" not in partition.state:  # Adam creates its state only where there is none at all
            partition.make_state(internals.step_count(optimizer, 0.0, partition.weight.device))
        partition.state[EMA] = partition.weight.clone()


@torch.no_grad()
def update(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Adds the weights that the optimizer has just updated to their averages. The host does not wait for the device."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    if weights:
        torch._foreach_lerp_([optimizer.state[weight][EMA] for weight in weights], weights, 1 - decay)


@torch.no_grad()
def exchange(optimizer: Any, model: nn.Module, coordinates: RankCoordinates) -> None:
    """Exchanges weights and average, and recomputes the weights of the forward pass; arguments as for `partitions_of`.

    A second call restores both, bit for bit. Every rank calls it.
    """
    for partition in internals.partitions_of(optimizer, model, coordinates):
        pieces = zip(partition.weight.split(CHUNK), partition.flat(EMA).split(CHUNK), strict=True)
        for weight, average in pieces:
            copy = weight.clone()
            weight.copy_(average)
            average.copy_(copy)
    internals.refresh_low_precision(optimizer)


def fill(partition: Partition, reader: StateReader) -> None:
    """Fills a partition's average from a checkpoint, or from the weights if the checkpoint has no average."""
    average = partition.flat(EMA)
    if not reader.has_average:
        average.copy_(partition.weight)
        return
    for fragment in partition.fragments:
        reader.fill(average.narrow(0, fragment.offset, fragment.length), fragment, EMA)
