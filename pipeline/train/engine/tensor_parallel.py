"""Tensor parallelism through DeepSpeed's AutoTP: a block's matrices are split over neighboring ranks.

c_attn and c_fc are split by output (c_attn separately for queries, keys and values, so that a rank has complete heads),
the two c_proj by input. Every rank has a replica of all other parameters.
"""

import re

import torch
from torch import nn
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from pipeline.checkpoint.fragments import Part
from pipeline.config import TrainConfig
from pipeline.distributed import Ranks

SPLITS = {  # by name: dimension of a Linear's weight or bias, and number of matrices concatenated along it
    r"attn\.c_attn\.(weight|bias)$": (0, 3),
    r"mlp\.c_fc\.(weight|bias)$": (0, 1),
    r"(attn|mlp)\.c_proj\.weight$": (1, 1),
}


def prepare(model: GPT2LMHeadModel, size: int) -> None:
    """Prepares a complete model for AutoTP: replaces GPT-2's Conv1D by Linear, and sets a rank's number of heads."""
    for block in model.transformer.h:
        for module in (block.attn, block.mlp):
            for name, child in list(module.named_children()):
                if isinstance(child, Conv1D):
                    setattr(module, name, _linear(child))
        block.attn.num_heads //= size
        block.attn.split_size //= size


def parts(model: nn.Module, config: TrainConfig, ranks: Ranks) -> dict[str, Part]:
    """This rank's part of each parameter that is split; empty without tensor parallelism."""
    size = config.parallel.tensor_parallel
    if size == 1:
        return {}
    found = {}
    for name, parameter in model.named_parameters():
        for pattern, (dimension, matrices) in SPLITS.items():
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
