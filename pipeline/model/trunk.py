"""The forward pass of training: embeddings, blocks, last norm and head, without transformers' code around them.

transformers' own forward pass of the complete model looks for packed sequences and makes masks. That waits for the
device in every pass, and breaks the graph of torch.compile. Here the same modules compute the same numbers, bit for
bit.

Letters in shape comments: B images, T positions, D width, V colors.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import GPT2LMHeadModel

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


class Trunk:
    """A callable: tokens long (B, T) to logits (B, T, V)."""

    def __init__(self, model: GPT2LMHeadModel, compiled: Compile | None = None) -> None:
        """compiled: torch.compile with its options, to run each block and the norm after it as one graph; None to call
        the blocks as they are."""
        self._model = model
        self._block_and_norm = None if compiled is None else compiled(block_and_norm)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        trunk = self._model.transformer
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        states = trunk.drop(trunk.wte(tokens) + trunk.wpe(positions))  # (B, T, D)
        if self._block_and_norm is None:
            for block in trunk.h:
                states = block(states)
            normed = trunk.ln_f(states)
        else:
            norms = [*(block.ln_1 for block in trunk.h), trunk.ln_f]
            normed = norms[0](states)
            for block, norm in zip(trunk.h, norms[1:], strict=True):
                states, normed = self._block_and_norm(block, norm, states, normed)
        return self._model.lm_head(normed)


def block_and_norm(
    block: Any, norm: nn.Module, states: torch.Tensor, normed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A block without its first norm, followed by the next one: states and normed states (B, T, D) to the next two.

    Cut there, the last addition of a block and the norm that follows are in one graph, and become one kernel. Every
    block has the same graph, so it is compiled once; a graph of all blocks would take minutes for the deep models, and
    would hand over no gradient before all are computed, so that ranks could not exchange them meanwhile.
    """
    states = block.attn(normed)[0] + states
    states = states + block.mlp(block.ln_2(states))
    return states, norm(states)
