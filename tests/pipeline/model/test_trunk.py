"""The training forward pass against transformers' own, to the bit; no host wait, no graph break."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2LMHeadModel

from pipeline.config import ModelConfig
from pipeline.model.gpt import build_model, initialize
from pipeline.model.gpt_config import BLOCKS, gpt2_config
from pipeline.model.recompute import recompute_blocks
from pipeline.model.trunk import Trunk

OBJECTIVES = ("next_color", "masked_color")
WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique", "masked_select"}
"""Operators whose result, or its shape, the host must wait for."""


def new_model(block: str = "igpt", objective: str = "next_color", dropout: float = 0.0) -> GPT2LMHeadModel:
    shape = ModelConfig(layers=2, width=32, heads=2, resolution=8, block=block, dropout=dropout)  # type: ignore[arg-type]
    model = build_model(gpt2_config(shape, 512, objective))
    initialize(model, seed=0)
    torch.nn.init.normal_(model.lm_head.weight, generator=torch.manual_seed(0))
    return model.train()


def some_tokens() -> torch.Tensor:
    return torch.randint(0, 512, (3, 64), generator=torch.manual_seed(1))


def logits_and_gradients(model: GPT2LMHeadModel, forward: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    torch.manual_seed(2)  # of the dropout
    logits = forward(some_tokens())
    loss = functional.cross_entropy(logits[..., :512].flatten(0, 1), some_tokens().flatten())
    return [logits, *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize(
    ("block", "objective", "dropout", "recompute"),
    [
        ("igpt", "next_color", 0.0, False),
        ("gpt2", "masked_color", 0.0, False),
        ("gpt2", "next_color", 0.1, False),
        ("igpt", "masked_color", 0.1, True),
    ],
)
def test_the_same_bits_as_transformers(block: str, objective: str, dropout: float, recompute: bool) -> None:
    model = new_model(block, objective, dropout)
    expected = logits_and_gradients(model, lambda tokens: model(input_ids=tokens).logits)
    if recompute:
        recompute_blocks(model.transformer.h)
    elif not dropout:  # what is compiled, in eager mode
        assert all(map(torch.equal, logits_and_gradients(model, Trunk(model, lambda function: function)), expected))
    assert all(map(torch.equal, logits_and_gradients(model, Trunk(model)), expected))


class CountedWaits(TorchDispatchMode):
    """Counts operators that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        self.counts.update([name] if name in WAITS else [])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_pass_waits_for_nothing(objective: str) -> None:
    model = new_model("igpt", objective)
    with CountedWaits() as waits:
        logits_and_gradients(model, Trunk(model))
    assert not waits.counts


@pytest.mark.parametrize(("block", "objective"), zip(BLOCKS, OBJECTIVES, strict=True))
def test_all_blocks_are_one_graph_whose_attention_has_no_mask(block: str, objective: str) -> None:
    model, graphs = new_model(block, objective), []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    def compiled(function: Any) -> Any:
        return torch.compile(function, backend=backend, fullgraph=True, dynamic=False)

    torch._dynamo.reset()
    expected = Trunk(model)(some_tokens())
    assert torch.equal(Trunk(model, compiled)(some_tokens()), expected)
    [graph] = graphs
    [attention] = [node for node in graph.graph.nodes if "scaled_dot_product_attention" in str(node.target)]
    assert (attention.kwargs["is_causal"], attention.kwargs["attn_mask"]) == (objective == "next_color", None)
    complete = compiled(Trunk(model, lambda function: function).__call__)  # nothing around the blocks breaks it
    assert torch.equal(complete(some_tokens()), expected)
