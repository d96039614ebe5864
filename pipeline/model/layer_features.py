"""The features of each layer: the outputs of the norms (Chen et al. 2020, section 3.3).

The feature of layer l is the input of attention block l after its ln_1, l = 0 .. L-1; that of layer L is the output of
ln_f. Pooled, it is the mean over positions.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn

Observe = Callable[[int, torch.Tensor], None]
"""Receives the number of a layer, and its features (B, T, D)."""


def layer_norms(model: nn.Module) -> list[nn.Module]:
    """The norm whose output is the feature of each layer, L+1 of them."""
    return [*(block.ln_1 for block in model.transformer.h), model.transformer.ln_f]


@contextmanager
def observed_layers(model: nn.Module, layers: Iterable[int], observe: Observe) -> Iterator[None]:
    """Context in which each forward pass calls `observe` with the features of each of these layers."""
    norms = layer_norms(model)

    def report(layer: int, _module: nn.Module, _inputs: tuple[torch.Tensor], normed: torch.Tensor) -> None:
        observe(layer, normed)

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(norms[layer].register_forward_hook(partial(report, layer)))
        yield


def pooled(normed: torch.Tensor) -> torch.Tensor:
    """The mean over positions of features (B, T, D), fp32 (B, D)."""
    return normed.mean(dim=1, dtype=torch.float32)
