"""The initial weights of a rank: each parameter is drawn completely, and the rank keeps its part."""

import torch
from torch import nn
from transformers import GPT2Config

from pipeline.checkpoint.fragments import Part
from pipeline.model.gpt import initial_value


@torch.no_grad()
def initialize_parts(model: nn.Module, config: GPT2Config, seed: int, parts: dict[str, Part]) -> None:
    """Initializes every parameter that is not on the meta device.

    parts: this rank's part of each parameter that tensor parallelism splits. The values do not depend on the topology.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue
        part = parts.get(name)
        shape = tuple(parameter.shape)
        value = initial_value(name, part.full_shape(shape) if part else shape, config, seed)
        parameter.copy_(part.of(value).reshape(shape) if part else value)
