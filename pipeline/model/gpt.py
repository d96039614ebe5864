"""The models: published sizes, the paper's block out of transformers' GPT-2 modules, and the initial weights.

Sources: "Generative Pretraining from Pixels" (Chen et al., ICML 2020), sections 2.2 and A.1, and the authors' code,
github.com/openai/image-gpt, src/model.py.

A model of either block is a transformers GPT2LMHeadModel, called as `model(input_ids).logits`. Its vocabulary is the
palette's colors and, as the last row, SOS: the vector that stands in front of the first pixel.

Letters in shape comments: B images, T positions, D width, V colors, H heads, L layers.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from pipeline.config import ModelConfig
from pipeline.model.seeding import torch_generator

BLOCKS = ("igpt", "gpt2")
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


def gpt2_config(model: ModelConfig, colors: int = 512, objective: str = "next_color") -> GPT2Config:
    """The GPT2Config of a model over `colors` colors and SOS, with one position a pixel.

    Two attributes are ours, `block` and `colors`; they survive to_dict() and from_dict(). A model of hidden colors has
    `objective` too and attends in both directions (`is_causal`), and its row for SOS stands for a hidden color: zero,
    and never learned.
    """
    return GPT2Config(
        n_layer=model.shape.layers,
        n_embd=model.shape.width,
        n_head=model.shape.heads,
        n_positions=model.resolution**2,
        vocab_size=colors + 1,
        activation_function="quick_gelu" if model.block == "igpt" else "gelu_new",
        **({} if objective == "next_color" else {"objective": objective, "is_causal": False}),
        **fixed_settings(model.block, colors) | dict.fromkeys(DROPOUTS, model.dropout),
    )


def fixed_settings(block: str, colors: int) -> dict[str, object]:
    """What every model of ours has in common in its GPT2Config, whatever its shape."""
    return {
        "block": block,
        "colors": colors,
        "bos_token_id": colors,
        "eos_token_id": None,
        **dict.fromkeys(DROPOUTS, 0.0),
        "tie_word_embeddings": False,
        "use_cache": False,
        "attn_implementation": "sdpa",
    }


def build_model(config: GPT2Config) -> GPT2LMHeadModel:
    """The model on the current default device, its weights allocated but not set.

    `initialize` or a checkpoint sets them. Runs under `torch.device("meta")` and under DeepSpeed's `zero.Init()` too,
    since nothing here reads or writes a weight; there, fill each gathered parameter with `initial_value`.
    """
    # Not kept by to_dict(), and without it attention blocks run alone would not be causal.
    config._attn_implementation = "sdpa"
    with no_init_weights():
        model = GPT2LMHeadModel(config)
        if config.block == "igpt":
            _use_paper_block(model)
    if not getattr(config, "is_causal", True):
        model.transformer.wte.padding_idx = config.colors  # its row gets no gradient
        for block in model.transformer.h:
            block.attn.is_causal = False  # the configuration's counts for the whole model only
    return model


def _use_paper_block(model: GPT2LMHeadModel) -> None:
    """Changes what the paper's model has otherwise than GPT-2: norms, bias-free projections, a head of V colors."""
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
    """Sets every parameter that has memory to its initial value. The zero head makes the loss before step 1 ln V."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_meta:
                parameter.copy_(initial_value(name, parameter.shape, model.config, seed))


def initial_value(name: str, shape: Sequence[int], config: GPT2Config, seed: int) -> torch.Tensor:
    """The initial value of one parameter, fp32 on the CPU.

    Drawn from a generator of its own, seeded by (seed, name): the same on every rank, for every partition of the model,
    in any order.
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
    """The authors' code: embeddings .02 (SOS among them), positions .01, attention by width and depth, MLP .02."""
    if name.endswith("attn.c_attn.weight"):
        return config.n_embd**-0.5
    if name.endswith("attn.c_proj.weight"):
        return (config.n_embd * config.n_layer) ** -0.5
    return 0.01 if name.endswith("wpe.weight") else 0.02


def _gpt2_std(name: str, config: GPT2Config) -> float:
    """GPT-2's own: .02, and the two projections back into the residual stream scaled by its 2L additions."""
    std = config.initializer_range
    return std / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else std
