"""Turns an error of allocation into advice."""

import torch

from pipeline.memory_errors import OutOfMemory, is_out_of_memory
from pipeline.plan.advice import cluster_of, memory_advice
from pipeline.train.setup import Inputs


def with_advice(error: BaseException, inputs: Inputs) -> OutOfMemory | None:
    """An error of allocation as one sentence with the plan's figures for this run; None for any other error."""
    if not is_out_of_memory(error):
        return None
    device, name, size = inputs.ranks.device, None, 0.0
    if device.type == "cuda":
        name, size = torch.cuda.get_device_name(device), float(torch.cuda.get_device_properties(device).total_memory)
    advice = memory_advice(inputs.config, inputs.model_config, cluster_of(name, size, inputs.ranks.count))
    return OutOfMemory(error, "", advice)
