"""Tensor parallelism through DeepSpeed's AutoTP: a block's matrices are cut over neighbouring ranks.

c_attn and c_fc are cut by output (c_attn within each of queries, keys and values, so that a rank holds whole heads),
the two c_proj by input. Everything else is held whole by every rank.
"""

import re

import torch
from torch import nn
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from pipeline.checkpoint.fragments import Part
from pipeline.config import TrainConfig
from pipeline.distributed import Ranks

CUTS = {  # dimension of a Linear's weight or bias, and how many matrices lie end to end in it
    r"attn\.c_attn\.(weight|bias)$": (0, 3),
    r"mlp\.c_fc\.(weight|bias)$": (0, 1),
    r"(attn|mlp)\.c_proj\.weight$": (1, 1),
}


def prepare(model: GPT2LMHeadModel, size: int) -> None:
    """Makes a whole model one that AutoTP can cut: Linear for GPT-2's Conv1D, and a rank's share of the heads."""
    for block in model.transformer.h:
        for module in (block.attn, block.mlp):
            for name, child in list(module.named_children()):
                if isinstance(child, Conv1D):
                    setattr(module, name, _linear(child))
        block.attn.num_heads //= size
        block.attn.split_size //= size


def parts(model: nn.Module, config: TrainConfig, ranks: Ranks) -> dict[str, Part]:
    """By parameter, the part that this rank holds of those that are cut; empty without tensor parallelism."""
    size = config.parallel.tensor_parallel
    if size == 1:
        return {}
    found = {}
    for name, parameter in model.named_parameters():
        for pattern, (dimension, matrices) in CUTS.items():
            if re.search(pattern, name):
                transposed = config.model.block == "gpt2" and parameter.dim() == 2
                found[name] = Part(dimension, matrices, ranks.rank % size, size, transposed)
    return found


def _linear(conv: Conv1D) -> nn.Linear:
    linear = nn.Linear(conv.nx, conv.nf, device=conv.weight.device, dtype=conv.weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.T)
        linear.bias.copy_(conv.bias)
    return linear
