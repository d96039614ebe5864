"""The scores of the next color, one position after the other: keys and values of earlier positions are cached.

A position is a chain of small operations, and its floor is the time in which the weights are read once. transformers'
own pass spends several times that between the operations; here the model's modules are called one after the other and
nothing else is done. On CUDA the chain is recorded once and replayed as a graph; on CPU the weights are laid out once
for products of few rows.

Letters: B images, N new positions, P positions in all, D width, V colors, H heads of d dimensions.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

Product = Callable[[torch.Tensor], torch.Tensor]
"""A linear module's work: (..., inputs) to (..., outputs)."""


class Decoder:
    """Called with SOS and the colors so far, long (B, n), n growing: the scores of the next color, (B, V).

    The first call may have any n >= 1, each later one a single new position. Takes 2 * L * B * P * D numbers; on CPU in
    fp32, since its attention is slower in bf16, and fp32 weights are held twice.
    """

    def __init__(self, model: nn.Module, positions: int, recorded: bool = True) -> None:
        """model: a GPT2LMHeadModel of either block; positions: how many there will be at most.

        recorded: False for weights that ranks share: CUDA refuses to record what fetches them, or sends their results.
        """
        self._model, self._positions, self._recorded = model, positions, recorded
        self._seen = 0
        self._products: dict[nn.Module, Product] = {}
        self._memories: list[torch.Tensor] = []  # of each block, (2, B, H, P, d): keys and values
        self._graph: _Graph | None = None

    def __call__(self, so_far: torch.Tensor) -> torch.Tensor:
        first, end = self._seen, so_far.shape[1]
        assert first == 0 or end == first + 1, "one new position at a time after the first call"
        self._seen = end
        new = so_far[:, first:]
        if first > 0 and new.is_cuda and self._recorded:
            if self._graph is None:
                self._graph = _Graph(self, new, first)
            return self._graph.replay(new, first)
        return self._pass(new, torch.arange(first, end, device=new.device), end)

    def _pass(self, tokens: torch.Tensor, places: torch.Tensor, end: int | None) -> torch.Tensor:
        """(B, V) after the new tokens (B, N) at places (N,).

        end: how many positions are known with them; None if a recorded pass is to serve for any number: it attends to
        all P under a mask.
        """
        trunk = self._model.transformer
        states = trunk.wte(tokens) + trunk.wpe(places)  # (B, N, D)
        for number, block in enumerate(trunk.h):
            states = states + self._attend(number, block.attn, block.ln_1(states), places, end)
            inner = block.mlp.act(self._product(block.mlp.c_fc)(block.ln_2(states)))  # (B, N, 4 * D)
            states = states + self._product(block.mlp.c_proj)(inner)
        return self._product(self._model.lm_head)(trunk.ln_f(states[:, -1]))[:, : self._model.config.colors]

    def _attend(
        self, number: int, attention: Any, normed: torch.Tensor, places: torch.Tensor, end: int | None
    ) -> torch.Tensor:
        split = self._product(attention.c_attn)(normed).unflatten(-1, (3, -1, attention.head_dim))  # (B, N, 3, H, d)
        queries, keys_values = split[:, :, 0].transpose(1, 2), split[:, :, 1:].permute(2, 0, 3, 1, 4)
        if number == len(self._memories):
            dtype = torch.float32 if split.device.type == "cpu" else split.dtype
            shape = (*keys_values.shape[:3], self._positions, attention.head_dim)
            self._memories.append(torch.zeros(shape, dtype=dtype, device=split.device))
        memory = self._memories[number]
        memory.index_copy_(3, places, keys_values.to(memory.dtype))
        keys, values = memory[..., :end, :]
        # Not (P,): torch's choice of a kernel reads a mask's last two dimensions.
        mask = None if end else (torch.arange(self._positions, device=places.device) <= places)[None]  # (1, P)
        with torch.autocast(split.device.type, enabled=False):  # it would round all that is cached at every position
            mixed = functional.scaled_dot_product_attention(
                queries.to(memory.dtype),
                keys,
                values,
                attn_mask=mask,
                is_causal=mask is None and len(places) > 1,
                scale=attention.scaling,
            )  # (B, H, N, d)
        return self._product(attention.c_proj)(mixed.transpose(1, 2).flatten(2).to(split.dtype))

    def _product(self, module: nn.Module) -> Product:
        if module not in self._products:
            self._products[module] = _packed(module) or module
        return self._products[module]


def _packed(module: nn.Module) -> Product | None:
    """On CPU in fp32, the same product by oneDNN with weights that are laid out for it, twice as fast as torch's own
    where that is MKL's on AMD; None where the module does best itself."""
    plain = type(module) is nn.Linear and module.bias is None and not module._forward_pre_hooks
    if not plain or not torch.backends.mkldnn.is_available() or torch.is_autocast_enabled("cpu"):
        return None
    weight = module.weight.detach()
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return None
    laid_out = torch.ops.mkldnn._reorder_linear_weight(weight)
    return lambda inputs: torch.ops.mkldnn._linear_pointwise(inputs, laid_out, None, "none", [], "")


class _Graph:
    """The pass of one position as a CUDA graph, recorded at its first position."""

    def __init__(self, decoder: Decoder, token: torch.Tensor, place: int) -> None:
        self._token, self._place = token.clone(), torch.tensor([place], device=token.device)
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):  # what is done at a first call only must not be recorded
            decoder._pass(self._token, self._place, None)
        torch.cuda.current_stream().wait_stream(warm_up)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):  # a checkpoint's thread may copy
            self._scores = decoder._pass(self._token, self._place, None)

    def replay(self, token: torch.Tensor, place: int) -> torch.Tensor:
        """(B, V) after one token (B, 1) at a place; written over by the next call."""
        self._token.copy_(token)
        self._place.fill_(place)
        self._graph.replay()
        return self._scores
