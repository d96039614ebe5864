"""Autoregressive decoding: scores of the next color, one position at a time, with a key-value cache.

A position is a sequence of small operations, which takes at least the time to read the weights once. transformers' own
forward pass spends several times that between the operations, so the Decoder calls the model's modules directly. On
CUDA the sequence is captured once and replayed as a CUDA graph. On CPU the weights are reordered once for matrix
products with few rows, or transposed for those with one row.

Letters: B images, N new positions, P positions in all, D width, V colors, H heads of d dimensions.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

Product = Callable[[torch.Tensor], torch.Tensor]
"""The matrix product of a linear module: (..., inputs) to (..., outputs)."""


class Decoder:
    """A callable: from SOS and the colors so far, long (B, n), to the scores of the next color, (B, V).

    The first call may have any n >= 1; each later call must add one position. The cache has 2 * L * B * P * D elements;
    on CPU it is fp32, because attention in bf16 is slower there, and fp32 weights are in memory twice.
    """

    def __init__(self, model: nn.Module, positions: int, use_graph: bool = True) -> None:
        """model: a GPT2LMHeadModel of either block; positions: the maximum number of positions.

        use_graph: False for partitioned weights: a CUDA graph can't capture their collectives.
        """
        self._model, self._positions, self._use_graph = model, positions, use_graph
        self._seen, self._images = 0, 0
        self._products: dict[nn.Module, Product] = {}
        self._caches: list[torch.Tensor] = []  # of each block, (2, B, H, P, d): keys and values
        self._graph: _Graph | None = None

    def __call__(self, so_far: torch.Tensor) -> torch.Tensor:
        first, end = self._seen, so_far.shape[1]
        assert first == 0 or end == first + 1, "the first call is followed by calls with one new position"
        self._seen, self._images = end, len(so_far)
        new = so_far[:, first:]
        if first > 0 and new.is_cuda and self._use_graph:
            if self._graph is None:
                self._graph = _Graph(self, new, first)
            return self._graph.replay(new, first)
        return self._pass(new, torch.arange(first, end, device=new.device), end)

    def _pass(self, tokens: torch.Tensor, positions: torch.Tensor, end: int | None) -> torch.Tensor:
        """Scores (B, V) after the new tokens (B, N) at positions (N,).

        end: number of positions including the new ones; None, for a graph that works for any number, attends to all P
        positions under a mask.
        """
        trunk = self._model.transformer
        states = trunk.wte(tokens) + trunk.wpe(positions)  # (B, N, D)
        mask = None if end else self._mask(positions)
        for number, block in enumerate(trunk.h):
            states = states + self._attend(number, block.attn, block.ln_1(states), positions, end, mask)
            inner = block.mlp.act(self._product(block.mlp.c_fc)(block.ln_2(states)))  # (B, N, 4 * D)
            states = states + self._product(block.mlp.c_proj)(inner)
        return self._product(self._model.lm_head)(trunk.ln_f(states[:, -1]))[:, : self._model.config.colors]

    def _mask(self, positions: torch.Tensor) -> torch.Tensor:
        """What is added to the scores of one new position, (1, P): 0 for those up to it, -inf for those after it.

        Additive and in the cache's dtype: torch would convert a bool mask in every layer.
        """
        after = torch.arange(self._positions, device=positions.device) > positions  # (P,)
        zeros = torch.zeros(self._positions, device=positions.device, dtype=self._caches[0].dtype)
        # Not (P,): torch reads a mask's last two dimensions to choose a kernel.
        return zeros.masked_fill_(after, float("-inf"))[None]

    def _attend(
        self,
        number: int,
        attention: Any,
        normed: torch.Tensor,
        positions: torch.Tensor,
        end: int | None,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        split = self._product(attention.c_attn)(normed).unflatten(-1, (3, -1, attention.head_dim))  # (B, N, 3, H, d)
        queries, keys_values = split[:, :, 0].transpose(1, 2), split[:, :, 1:].permute(2, 0, 3, 1, 4)
        if number == len(self._caches):
            dtype = torch.float32 if split.device.type == "cpu" else split.dtype
            shape = (*keys_values.shape[:3], self._positions, attention.head_dim)
            self._caches.append(torch.zeros(shape, dtype=dtype, device=split.device))
        cache = self._caches[number]
        cache.index_copy_(3, positions, keys_values.to(cache.dtype))
        keys, values = cache[..., :end, :]
        with torch.autocast(split.device.type, enabled=False):  # it would round the complete cache at every position
            mixed = functional.scaled_dot_product_attention(
                queries.to(cache.dtype),
                keys,
                values,
                attn_mask=mask,
                is_causal=mask is None and len(positions) > 1,
                scale=attention.scaling,
            )  # (B, H, N, d)
        return self._product(attention.c_proj)(mixed.transpose(1, 2).flatten(2).to(split.dtype))

    def _product(self, module: nn.Module) -> Product:
        if module not in self._products:
            self._products[module] = _packed(module, self._images) or module
        return self._products[module]


def _packed(module: nn.Module, images: int) -> Product | None:
    """The same product with weights laid out for the batch, on CPU in fp32; None if the module itself is best.

    With reordered weights oneDNN is up to twice as fast as torch's own product where that is MKL's on an AMD processor.
    For one row there, transposed weights are fastest, or torch's own product if the row is longer than the result.
    """
    plain = type(module) is nn.Linear and module.bias is None and not module._forward_pre_hooks
    if not plain or not torch.backends.mkldnn.is_available() or torch.is_autocast_enabled("cpu"):
        return None
    weight = module.weight.detach()
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return None
    if images == 1:
        if module.in_features > module.out_features:
            return None
        transposed = weight.t().contiguous()
        return lambda inputs: inputs @ transposed
    reordered = torch.ops.mkldnn._reorder_linear_weight(weight)
    return lambda inputs: torch.ops.mkldnn._linear_pointwise(inputs, reordered, None, "none", [], "")


class _Graph:
    """The forward pass of one position as a CUDA graph, captured at the first position."""

    def __init__(self, decoder: Decoder, token: torch.Tensor, position: int) -> None:
        self._token, self._position = token.clone(), torch.tensor([position], device=token.device)
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):  # one-time initialization must not be captured
            decoder._pass(self._token, self._position, None)
        torch.cuda.current_stream().wait_stream(warm_up)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):  # a checkpoint's thread may copy
            self._scores = decoder._pass(self._token, self._position, None)

    def replay(self, token: torch.Tensor, position: int) -> torch.Tensor:
        """Scores (B, V) after one token (B, 1) at a position; overwritten by the next call."""
        self._token.copy_(token)
        self._position.fill_(position)
        self._graph.replay()
        return self._scores
