"""The models: the paper's block from transformers' GPT-2 modules, and the initial weights.

Sources: "Generative Pretraining from Pixels" (Chen et al., ICML 2020), sections 2.2 and A.1, and the authors' code,
github.com/openai/image-gpt, src/model.py.

A model of either block is a transformers GPT2LMHeadModel, called as `model(input_ids).logits`. Its vocabulary is the
palette's colors and, as the last row, SOS: the vector before the first pixel.

Letters in shape comments: B images, T positions, D width, V colors, H heads, L layers.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from pipeline.model.seeding import torch_generator


def build_model(config: GPT2Config) -> GPT2LMHeadModel:
    """The model on the current default device, with uninitialized weights.

    `initialize` or a checkpoint sets them. Also works under `torch.device("meta")` and DeepSpeed's `zero.Init()`,
    because it neither reads nor writes a weight; there, fill each gathered parameter with `initial_value`.
    """
    # to_dict() drops it, and without it an attention block called directly would not be causal.
    config._attn_implementation = "sdpa"
    with no_init_weights():
        model = GPT2LMHeadModel(config)
        if config.block == "igpt":
            _use_paper_block(model)
    if not getattr(config, "is_causal", True):
        model.transformer.wte.padding_idx = config.colors  # its row has no gradient
        for block in model.transformer.h:
            block.attn.is_causal = False  # the configuration's value has no effect on single blocks
    return model


def _use_paper_block(model: GPT2LMHeadModel) -> None:
    """Replaces what differs from GPT-2 in the paper's model: norms, projections without bias, a head of V colors."""
    config = model.config
    for block in model.transformer.h:
        block.ln_1 = _rms_norm(config)
        block.ln_2 = _rms_norm(config)
        for module in (block.attn, block.mlp):
            for name, child in list(module.named_children()):
                if isinstance(child, Conv1D):
                    setattr(module, name, nn.Linear(child.nx, child.nf, bias=False))
    model.transformer.ln_f = _rms_norm(config)
    model.lm_head = nn.Linear(config.n_embd, config.colors, bias=False)


def _rms_norm(config: GPT2Config) -> nn.RMSNorm:
    return nn.RMSNorm(config.n_embd, eps=config.layer_norm_epsilon)


def initialize(model: nn.Module, seed: int) -> None:
    """Initializes every parameter that is not on the meta device. With the zero head the first loss is ln V."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_meta:
                parameter.copy_(initial_value(name, parameter.shape, model.config, seed))


def initial_value(name: str, shape: Sequence[int], config: GPT2Config, seed: int) -> torch.Tensor:
    """The initial value of one parameter, fp32 on the CPU.

    Drawn from a generator seeded by (seed, name): the same on every rank, for any partitioning, in any order.
    """
    if name == "lm_head.weight" or name.endswith(".bias"):
        return torch.zeros(*shape, device="cpu")
    if ".ln_" in name:
        return torch.ones(*shape, device="cpu")
    generator = torch_generator(f"{seed}:{name}")
    std = _paper_std(name, config) if config.block == "igpt" else _gpt2_std(name, config)
    value = torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").mul_(std)
    if name == "transformer.wte.weight" and not getattr(config, "is_causal", True):
        value[config.colors] = 0
    return value


def _paper_std(name: str, config: GPT2Config) -> float:
    """As in the authors' code: embeddings and SOS .02, positions .01, attention by width and depth, MLP .02."""
    if name.endswith("attn.c_attn.weight"):
        return config.n_embd**-0.5
    if name.endswith("attn.c_proj.weight"):
        return (config.n_embd * config.n_layer) ** -0.5
    return 0.01 if name.endswith("wpe.weight") else 0.02


def _gpt2_std(name: str, config: GPT2Config) -> float:
    """As in GPT-2: .02, and the two projections into the residual stream scaled by 1 / sqrt(2L)."""
    std = config.initializer_range
    return std / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else std
