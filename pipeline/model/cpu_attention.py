"""Attention on CPU as matrix products and a softmax, in blocks of queries.

In bf16 this can be twice as fast as torch's FlashAttention on CPU. A block of queries multiplies only the keys that it
sees, so nearly half of the matrix of probabilities is neither computed nor stored. The other half is stored for the
backward pass, B * H * T^2 bytes a layer in bf16, which FlashAttention computes again.

Letters: B images, H heads, T positions, d dimensions of a head, R queries of a block, K keys that they see.
"""

from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ROWS = 128
"""Queries in a block. Smaller blocks compute fewer masked scores, but in smaller matrix products."""


class BlockedAttention(torch.autograd.Function):
    """apply(queries, keys, values, scale, causal): as scaled_dot_product_attention; all (B, H, T, d)."""

    @staticmethod
    def forward(
        ctx: Any, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, causal: bool
    ) -> torch.Tensor:
        """The mixed values (B, H, T, d)."""
        q, k, v = (tensor.reshape(-1, *tensor.shape[2:]) for tensor in (queries, keys, values))  # (B * H, T, d)
        mixed, probabilities = [], []
        for first, last, end in _blocks(q.shape[1], causal):
            scores = _scaled_product(q[:, first:last], k[:, :end].transpose(1, 2), scale)  # (B * H, R, K)
            if causal:
                ones = torch.ones(last - first, last - first, dtype=torch.bool, device=q.device)
                scores[:, :, first:].masked_fill_(ones.triu(1), float("-inf"))
            probabilities.append(torch.softmax(scores, -1))
            mixed.append(torch.bmm(probabilities[-1], v[:, :end]))
        ctx.save_for_backward(q, k, v, *probabilities)
        ctx.scale, ctx.causal = scale, causal
        return torch.cat(mixed, 1).view(queries.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """Gradients of queries, keys and values."""
        q, k, v, *probabilities = ctx.saved_tensors
        g, scale = gradient.reshape(q.shape), ctx.scale
        grad_q, grad_k, grad_v = [], torch.zeros_like(k), torch.zeros_like(v)
        for (first, last, end), p in zip(_blocks(q.shape[1], ctx.causal), probabilities, strict=True):
            grad_p = torch.bmm(g[:, first:last], v[:, :end].transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype)  # (B * H, R, K)
            grad_q.append(_scaled_product(grad_scores, k[:, :end], scale))
            grad_k[:, :end].baddbmm_(grad_scores.transpose(1, 2), q[:, first:last], alpha=scale)
            grad_v[:, :end].baddbmm_(p.transpose(1, 2), g[:, first:last])
        return *(tensor.view(gradient.shape) for tensor in (torch.cat(grad_q, 1), grad_k, grad_v)), None, None


def _blocks(positions: int, causal: bool) -> list[tuple[int, int, int]]:
    """Of each block: its first query, the one after its last, and the number of keys that it sees."""
    edges = [(first, min(first + ROWS, positions)) for first in range(0, positions, ROWS)]
    return [(first, last, last if causal else positions) for first, last in edges]


def _scaled_product(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """left @ right * scale, rounded once."""
    ignored = left.new_empty(1, 1, 1)
    return torch.baddbmm(ignored, left, right, beta=0, alpha=scale)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Takes the place of transformers' sdpa_attention_forward: mixed values (B, T, H, d), and no weights.

    Passes everything else to scaled_dot_product_attention: other devices and dtypes, masks, dropout,
    and queries of fewer positions than keys.
    """
    ours = query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.shape == key.shape
    if not ours or attention_mask is not None or dropout:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling=scaling, is_causal=is_causal, **options
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    mixed = BlockedAttention.apply(query, key, value, scale, causal)
    return mixed.transpose(1, 2).contiguous(), None
