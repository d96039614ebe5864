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
from pipeline.model.trunk import Trunk, block_and_norm

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


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("dropout", "recompute"), [(0.0, False), (0.1, False), (0.1, True)])
def test_the_same_bits_as_transformers(block: str, objective: str, dropout: float, recompute: bool) -> None:
    model = new_model(block, objective, dropout)
    expected = logits_and_gradients(model, lambda tokens: model(input_ids=tokens).logits)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
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
def test_the_compiled_trunk_is_one_graph_with_causal_kernels(block: str, objective: str) -> None:
    """Each block is the same graph; and so is the complete pass, which is a stricter test of what it calls."""
    model, graphs = new_model(block, objective), []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    def compiled(function: Any) -> Any:
        return torch.compile(function, backend=backend, fullgraph=True, dynamic=False)

    torch._dynamo.reset()
    expected = Trunk(model)(some_tokens())
    assert torch.equal(Trunk(model, compiled)(some_tokens()), expected)
    assert len(graphs) == 1
    assert torch.equal(compiled(Trunk(model, block_and_norm_itself))(some_tokens()), expected)
    assert len(graphs) == 2
    attention = [node for node in graphs[1].graph.nodes if "scaled_dot_product_attention" in str(node.target)]
    assert [node.kwargs["is_causal"] for node in attention] == [objective == "next_color"] * 2
    assert [node.kwargs["attn_mask"] for node in attention] == [None] * 2


def block_and_norm_itself(function: Any) -> Any:
    assert function is block_and_norm
    return function
