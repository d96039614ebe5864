"""Dropout under tensor parallelism: the same masks outside the split matrices, others inside, as in Megatron-LM.

Without sequence parallelism the ranks of a group have the same random state, so they drop the same elements of
embeddings and residuals. In attention each has other heads, and drops by a stream of its own, seeded by the common
state and its rank. With sequence parallelism every rank has other positions, and a random state of its own.

Either way the masks are a function of the process's default generator alone: recomputing a block draws them again, and
a checkpoint of its state resumes them.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "sdpa_of_own_stream"
"""Of the attention function in transformers' registry."""


def use_own_attention_dropout(attention: nn.Module, rank: int) -> None:
    """Makes a block's attention drop by the stream of this rank of its tensor group."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
    attention.config._attn_implementation = NAME
    attention.tensor_rank = rank  # type: ignore[assignment]


@torch.compiler.disable(reason="its dropout has its own random state; with parallel.sequence_parallel it is compiled")
def _attend(module: Any, queries: torch.Tensor, *inputs: Any, dropout: float = 0.0, **options: Any) -> Any:
    """As transformers' attention functions."""
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if not dropout:
        return attend(module, queries, *inputs, dropout=0.0, **options)
    with _own_stream(queries.device, module.tensor_rank):
        return attend(module, queries, *inputs, dropout=dropout, **options)


@contextmanager
def _own_stream(device: torch.device, rank: int) -> Iterator[None]:
    """In this context the device's default generator draws for one rank; afterwards it is one draw further."""
    generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
    common = generator.get_state()
    torch.rand(1, device=device)
    later = generator.get_state()
    digest = hashlib.sha256(common.numpy().tobytes() + rank.to_bytes(4)).digest()
    generator.manual_seed(int.from_bytes(digest[:7]))
    try:
        yield
    finally:
        generator.set_state(later)
