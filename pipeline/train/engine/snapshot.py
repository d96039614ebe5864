"""Copies a rank's weights, moments and average to the host, and restores them from a checkpoint of any topology."""

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from pipeline.checkpoint.fragments import EMA, STATES, FragmentReader, Tensors
from pipeline.distributed import raise_on_all_ranks
from pipeline.train.engine import average
from pipeline.train.engine import deepspeed_internals as internals
from pipeline.train.engine.deepspeed_internals import RankCoordinates


def snapshot(
    optimizer: Any, model: nn.Module, coordinates: RankCoordinates, earlier: Tensors | None = None
) -> tuple[Tensors, list[dict[str, Any]]]:
    """Copies of this rank's fragments on the host, and their index for the file's header.

    The first arguments are those of `partitions_of`. earlier: tensors of a snapshot that is no longer needed; they are
    overwritten, which is much faster than allocating new ones.
    """
    earlier = earlier or {}
    tensors: Tensors = {}
    index = []
    for partition in internals.partitions_of(optimizer, model, coordinates):
        for fragment in partition.fragments:
            if fragment.part is None and not coordinates.writes_replicated:
                continue
            for state in (*STATES, EMA) if EMA in partition.state else STATES:
                flat = partition.flat(state).detach()
                cut = flat.narrow(0, fragment.offset, fragment.length)
                key = fragment.key(state)
                tensors[key] = earlier[key].copy_(cut) if key in earlier else _host_copy(cut)
            index.append(
                {
                    "name": fragment.name,
                    "shape": list(fragment.shape),
                    "start": fragment.start,
                    "length": fragment.length,
                    "step": float(partition.state["step"]) if "step" in partition.state else 0.0,
                    "part": asdict(fragment.part) if fragment.part else None,
                }
            )
    return tensors, index


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """An fp32 copy on the host, in pinned memory if copied from an accelerator."""
    copy = torch.empty(tensor.shape, dtype=torch.float32, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor)


@torch.no_grad()
def restore(optimizer: Any, model: nn.Module, coordinates: RankCoordinates, reader: FragmentReader) -> None:
    """Fills a rank's weights and moments from a checkpoint of any topology; arguments as for `partitions_of`.

    The average of the weights, if the engine has one, is the checkpoint's, or starts from the weights if that has none.
    Raises ValueError if the checkpoint's parameters are not the model's.
    """
    names = {name for name, _ in model.named_parameters()}
    if names != reader.shapes.keys():
        differing = sorted(names ^ reader.shapes.keys())
        raise ValueError(f"The checkpoint and the model have different parameters: {', '.join(differing[:3])}.")
    if isinstance(optimizer, torch.optim.Optimizer):  # ZeRO-0: a rank holds everything, and writes only its share
        coordinates = replace(coordinates, rank=0, ranks=1)
    step = reader.optimizer_step
    with raise_on_all_ranks():
        for partition in internals.partitions_of(optimizer, model, coordinates):
            partition.make_state(internals.step_count(optimizer, step, partition.weight.device))
            for state in STATES:
                flat = partition.flat(state)
                for fragment in partition.fragments:
                    reader.fill(flat.narrow(0, fragment.offset, fragment.length), fragment, state)
            if EMA in partition.state:
                average.fill(partition, reader)
    internals.refresh_low_precision(optimizer)
