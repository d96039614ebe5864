"""Tensor parallelism as in Megatron-LM: a block's matrices are split over neighboring ranks.

c_attn and c_fc are split by output (c_attn separately for queries, keys and values, so that a rank has complete heads),
the two c_proj by input. Every rank has a replica of all other parameters: embeddings, norms, the biases of c_proj and
the head. With sequence parallelism it applies those of the blocks to its own positions (tensor_group.py).

The matrices are those of nn.Linear, (outputs, inputs); GPT-2's Conv1D has them the other way round.
"""

import re
from collections.abc import Iterable
from contextlib import redirect_stdout
from copy import copy
from io import StringIO
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology
from torch import nn
from torch.nn import functional
from transformers import GPT2LMHeadModel

from pipeline.checkpoint.fragments import Part
from pipeline.config import TrainConfig
from pipeline.distributed import Ranks
from pipeline.train.engine import tensor_group
from pipeline.train.engine.tensor_dropout import use_own_attention_dropout
from pipeline.train.engine.tensor_group import TensorGroup

SPLITS = {  # by name: dimension of a Linear's weight or bias, and number of matrices concatenated along it
    r"attn\.c_attn\.(weight|bias)$": (0, 3),
    r"mlp\.c_fc\.(weight|bias)$": (0, 1),
    r"(attn|mlp)\.c_proj\.weight$": (1, 1),
}


def topology_of(config: TrainConfig, ranks: Ranks) -> PipeModelDataParallelTopology:
    """DeepSpeed's grid of stages, data-parallel and tensor-parallel ranks; those of a tensor group are neighbors."""
    parallel = config.parallel
    return PipeModelDataParallelTopology(
        num_pp=parallel.pipeline_stages, num_mp=parallel.tensor_parallel, num_dp=parallel.data_ranks(ranks.count)
    )


def grid_of(config: TrainConfig, ranks: Ranks) -> PipelineParallelGrid:
    """The groups of that grid, in the form in which DeepSpeed's ZeRO takes them (`mpu`). Every rank calls it."""
    with redirect_stdout(StringIO()):  # DeepSpeed prints the grid
        return PipelineParallelGrid(topology_of(config, ranks))


def new_group(config: TrainConfig, ranks: Ranks) -> TensorGroup | None:
    """This rank's tensor group; None without tensor parallelism. Every rank calls it."""
    size, own = config.parallel.tensor_parallel, None
    if size == 1:
        return None
    for members in topology_of(config, ranks).get_axis_comm_lists("model"):
        group = dist.new_group(members)
        if ranks.rank in members:
            own = TensorGroup(members.index(ranks.rank), size, group, config.parallel.sequence_parallel)
    assert own is not None, "every rank is in a tensor group"
    return own


def parts_of(model: nn.Module, block: str, group: TensorGroup | None) -> dict[str, Part]:
    """This rank's part of each parameter that is split; empty without tensor parallelism.

    block: as in the configuration.
    """
    found: dict[str, Part] = {}
    if group is None:
        return found
    for name, parameter in model.named_parameters():
        for pattern, (dimension, matrices) in SPLITS.items():
            if re.search(pattern, name):
                transposed = block == "gpt2" and parameter.dim() == 2
                found[name] = Part(dimension, matrices, group.rank, group.size, transposed)
    return found


def mark_parts(parameters: Iterable[tuple[str, nn.Parameter]], parts: dict[str, Part]) -> None:
    """Tells DeepSpeed which parameters are split: the gradient norm counts the others once."""
    for name, parameter in parameters:
        if name in parts:
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def split(model: GPT2LMHeadModel, group: TensorGroup) -> None:
    """Replaces the modules of a model on the meta device by those of one rank; parameters keep their names."""
    trunk = model.transformer
    for block in trunk.h:
        for module in (block.attn, block.mlp):
            module.c_proj = RowLinear(*_sizes(module.c_proj), group)
        block.attn.c_attn = ColumnLinear(*_sizes(block.attn.c_attn), group)
        block.mlp.c_fc = ColumnLinear(*_sizes(block.mlp.c_fc), group)
        block.attn.num_heads //= group.size
        block.attn.split_size //= group.size
        block.attn.config = copy(block.attn.config)
        if block.attn.attn_dropout.p and not group.splits_positions:
            use_own_attention_dropout(block.attn, group.rank)
        block.ln_1, block.ln_2 = _norm(block.ln_1, group), _norm(block.ln_2, group)
    trunk.ln_f = _norm(trunk.ln_f, group)
    trunk.drop = SplittingDropout(trunk.drop.p, group)
    model.lm_head = GatheringHead(model.lm_head.in_features, model.lm_head.out_features, group)


def _sizes(module: Any) -> tuple[int, int, bool]:
    """Inputs, outputs, and whether there is a bias, of a Linear or Conv1D."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features, module.bias is not None
    return module.nx, module.nf, True


class ColumnLinear(nn.Linear):
    """A rank's outputs of a linear module: (B, T or P, I) to (B, T, O / ranks)."""

    def __init__(self, inputs: int, outputs: int, bias: bool, group: TensorGroup) -> None:
        super().__init__(inputs, outputs // group.size, bias, device="meta")
        self.group = group

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return tensor_group.column(inputs, self.weight, self.bias, self.group)


class RowLinear(nn.Linear):
    """A linear module of which a rank has some inputs: (B, T, I / ranks) to (B, T or P, O)."""

    def __init__(self, inputs: int, outputs: int, bias: bool, group: TensorGroup) -> None:
        super().__init__(inputs // group.size, outputs, bias, device="meta")
        self.group = group

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return tensor_group.row(inputs, self.weight, self.bias, self.group)


class SplittingDropout(nn.Dropout):
    """The dropout of the embeddings, where positions are split: (B, T, D) to (B, T or P, D)."""

    def __init__(self, probability: float, group: TensorGroup) -> None:
        super().__init__(probability)
        self.group = group

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return super().forward(tensor_group.split_positions(states, self.group))


class GatheringHead(nn.Linear):
    """The head, before which positions are gathered: (B, T or P, D) to (B, T, V)."""

    def __init__(self, inputs: int, outputs: int, group: TensorGroup) -> None:
        super().__init__(inputs, outputs, bias=False, device="meta")
        self.group = group

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return super().forward(tensor_group.gather_positions(states, self.group))


class SharedRMSNorm(nn.RMSNorm):
    """An RMSNorm of some of the positions."""

    group: TensorGroup

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        weight = tensor_group.shared(self.weight, self.group)
        return functional.rms_norm(states, self.normalized_shape, weight, self.eps)


class SharedLayerNorm(nn.LayerNorm):
    """A LayerNorm of some of the positions."""

    group: TensorGroup

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        weight, bias = (tensor_group.shared(one, self.group) for one in (self.weight, self.bias))
        return functional.layer_norm(states, self.normalized_shape, weight, bias, self.eps)


def _norm(norm: Any, group: TensorGroup) -> SharedRMSNorm | SharedLayerNorm:
    new = SharedRMSNorm if isinstance(norm, nn.RMSNorm) else SharedLayerNorm
    made = new(norm.normalized_shape, eps=norm.eps, device="meta")
    made.group = group
    return made
