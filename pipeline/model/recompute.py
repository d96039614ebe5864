"""Activation checkpointing: a block keeps only its input, and is computed again in the backward pass."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_blocks(blocks: Iterable[nn.Module]) -> None:
    """Turns it on for these blocks, in training mode. Call it after they are compiled: the compiled code runs twice.

    transformers' own switch has another name in each of its versions.
    """
    for block in blocks:
        block.forward = partial(_forward, block, block.forward)  # type: ignore[method-assign]


def _forward(block: nn.Module, forward: Any, *inputs: Any, **options: Any) -> Any:
    if block.training and torch.is_grad_enabled():
        return checkpoint(forward, *inputs, use_reentrant=False, **options)
    return forward(*inputs, **options)
