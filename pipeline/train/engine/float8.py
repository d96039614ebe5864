"""precision fp8: the matrix products of the blocks in float8 through torchao; all else is as under bf16.

Each of a Linear's three products (output, gradient of the input, gradient of the weight) has its operands scaled so
that their largest element becomes the largest of the format, and rounded: activations and weights to e4m3 (448),
gradients to e5m2 (57344). Embeddings, attention, norms and the head stay in bf16. Parameters are bf16's own, under
their names, so that checkpoints know nothing of it.

Source: torchao 0.18, torchao.float8; after "FP8 Formats for Deep Learning", Micikevicius et al., 2022,
arXiv 2209.05433. Never run on CUDA so far.
"""

from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.float8.float8_linear import Float8Linear

from pipeline.config import TrainConfig

# One scale a tensor. torchao publishes both recipes' gains over bf16 for one GPT, Llama 3 8B on eight H100: 25% with
# this one, 10% with a scale a row ("rowwise"), of which its own filter expects nothing where a product has no more than
# 2048 outputs, as half of those of size L; nor has every Blackwell a kernel for it (pytorch issue 192707). Rowwise
# rounds finer, and was run on 2,000 accelerators. Its other merit, that no image's scale depends on those beside it,
# is had here by evaluating in bf16.
RECIPE = "tensorwise"
CAPABILITY = (8, 9)
"""The least compute capability with float8 kernels: Ada, Hopper."""


class TrainedInFloat8(Float8Linear):
    """Float8 in training passes; evaluated as it will be used, by its weights in bf16.

    So validation, probe and completions depend on neither the micro-batch, as a tensor's scale does, nor later pixels.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) if self.training else functional.linear(input, self.weight, self.bias)


def check_device(device: torch.device) -> None:
    """Raises ValueError naming `precision` if this accelerator has no float8 kernels; CPUs emulate them."""
    if device.type == "cpu":
        return
    found = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or found < CAPABILITY:
        kind = "which is not NVIDIA's" if torch.version.hip else f"of compute capability {found[0]}.{found[1]}"
        raise ValueError(
            f"precision is fp8, and the device is {torch.cuda.get_device_name(device)}, {kind}; it must be bf16 there: "
            f"float8 needs NVIDIA's {CAPABILITY[0]}.{CAPABILITY[1]} or later (Ada, Hopper, Blackwell)."
        )


def convert(blocks: nn.Module, device: torch.device) -> None:
    """Replaces every Linear below `blocks`; their parameters, on whatever device by now, stay the same objects.

    device: where they will be computed.
    """
    config = replace(Float8LinearConfig.from_recipe_name(RECIPE), emulate=device.type == "cpu")
    convert_to_float8_training(blocks, config=config)
    for module in blocks.modules():
        if isinstance(module, Float8Linear):
            module.__class__ = TrainedInFloat8  # torchao's conversion makes no other class than its own


def describe(config: TrainConfig, device: torch.device) -> str:
    """For the derived quantities: how the products are computed."""
    if device.type == "cpu":
        how = "emulated in fp32 on this CPU, slower than bf16: to be tried, not to be used"
    elif config.compile:
        how = "by kernels of this accelerator"
    else:
        how = "by kernels of this accelerator; without compile: true, scaling takes more time than they save"
    return f"the blocks' matrix products in training, {RECIPE} scaling, {how}; evaluation in bf16"
