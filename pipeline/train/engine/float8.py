"""precision fp8: the blocks' matrix products in float8 through torchao; everything else as with bf16.

For each of a Linear's three products (output, gradient of the input, gradient of the weight) the operands are scaled so
that their largest element is the largest of the format, and rounded: activations and weights to e4m3 (448), gradients
to e5m2 (57344). Embeddings, attention, norms and the head stay in bf16. Parameters stay bf16 under the same names, so
checkpoints are the same as with bf16.

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
from pipeline.train.engine import compilation

# "tensorwise" uses one scale per tensor, "rowwise" one per row. torchao publishes both recipes' speedup over bf16 for
# Llama 3 8B on eight H100: 25% with tensorwise, 10% with rowwise. torchao's own filter expects no speedup from rowwise
# for products with at most 2048 outputs, which are half of those of size L, and some Blackwell GPUs have no kernel for
# it (pytorch issue 192707). Rowwise rounds more finely, and was used on 2,000 accelerators. With rowwise no image's
# scale depends on other images; here that holds because evaluation runs in bf16.
RECIPE = "tensorwise"
CAPABILITY = (8, 9)
"""The lowest compute capability with float8 kernels: Ada and Hopper."""


class TrainedInFloat8(Float8Linear):
    """A Linear with float8 products in training, and bf16 products in evaluation.

    So validation, probe and completions do not depend on the other images of a micro-batch or on later pixels, as the
    scale of a tensor does.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) if self.training else functional.linear(input, self.weight, self.bias)


def check_device(device: torch.device) -> None:
    """Raises ValueError naming `precision` if this accelerator has no float8 kernels; CPUs emulate float8."""
    if device.type == "cpu":
        return
    found = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or found < CAPABILITY:
        kind = "which is not from NVIDIA" if torch.version.hip else f"of compute capability {found[0]}.{found[1]}"
        raise ValueError(
            f"precision is fp8, and the device is {torch.cuda.get_device_name(device)}, {kind}; set it to bf16: float8 "
            f"needs NVIDIA's {CAPABILITY[0]}.{CAPABILITY[1]} or later (Ada, Hopper, Blackwell)."
        )


def convert(blocks: nn.Module, device: torch.device) -> None:
    """Replaces every Linear in `blocks`; the parameters stay the same objects, on any device.

    device: where the products will be computed.
    """
    config = replace(Float8LinearConfig.from_recipe_name(RECIPE), emulate=device.type == "cpu")
    convert_to_float8_training(blocks, config=config)
    for module in blocks.modules():
        if isinstance(module, Float8Linear):
            module.__class__ = TrainedInFloat8  # torchao's conversion has no option for a subclass


def describe(config: TrainConfig, device: torch.device) -> str:
    """How the products are computed, for the derived quantities."""
    if device.type == "cpu":
        how = "emulated in fp32 on this CPU, slower than bf16: for tests only"
    elif compilation.is_on(config, device):
        how = "by kernels of this accelerator"
    else:
        how = "by kernels of this accelerator; without compilation, scaling takes longer than they save"
    return f"the blocks' matrix products in training, {RECIPE} scaling, {how}; evaluation in bf16"
