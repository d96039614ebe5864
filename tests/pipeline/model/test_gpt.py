"""The model against the published counts, the published initial values and torch's own definitions."""

import math

import pytest
import torch
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline.config import ModelConfig
from pipeline.model import objectives
from pipeline.model.gpt import build_model, initial_value, initialize
from pipeline.model.gpt_config import BLOCKS, gpt2_config
from pipeline.model.recompute import recompute_blocks

COLORS = 16


def tiny(block="igpt", **changes):
    return gpt2_config(
        ModelConfig(**({"layers": 2, "width": 32, "heads": 2, "resolution": 8} | changes), block=block), COLORS
    )


def initialized(config, seed=0):
    model = build_model(config)
    initialize(model, seed)
    return model.eval()


@pytest.mark.parametrize(
    ("size", "parameters"), [("s", 76_571_648), ("m", 455_157_760), ("l", 1_362_250_752), ("xl", 6_801_438_720)]
)
def test_published_parameter_counts(size, parameters):
    with torch.device("meta"):
        model = build_model(gpt2_config(ModelConfig(size=size)))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("block", BLOCKS)
def test_first_loss_is_ln_colors(block):
    model = initialized(gpt2_config(ModelConfig(layers=2, width=32, heads=2, resolution=8, block=block)))
    tokens = torch.randint(0, 512, (4, 64), generator=torch.Generator().manual_seed(0))
    inputs, targets = objectives.next_color(tokens, 512)
    loss = objectives.image_loss(model(inputs).logits, targets, 512).mean()
    assert loss.item() == pytest.approx(math.log(512), abs=1e-6)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("training", [False, True])
def test_causal(block, training):
    model = initialized(tiny(block)).train(training)
    torch.nn.init.normal_(model.lm_head.weight)
    tokens = torch.randint(0, COLORS, (2, 64), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 40] = (tokens[:, 40] + 1) % COLORS
    before, after = model(tokens).logits, model(changed).logits
    torch.testing.assert_close(before[:, :40], after[:, :40])
    assert (before[:, 40:] - after[:, 40:]).abs().amax((0, 2)).gt(1e-4).all(), "and every later position sees it"


def test_paper_block_written_out():
    """One block, from its formulas."""
    model = initialized(tiny(layers=1))
    torch.nn.init.normal_(model.lm_head.weight)
    weights = dict(model.named_parameters())
    for name, parameter in weights.items():
        if ".ln_" in name:
            torch.nn.init.normal_(parameter, mean=1.0)
    tokens = torch.randint(0, COLORS, (2, 64), generator=torch.Generator().manual_seed(0))

    def norm(states, name):
        return states / (states.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"transformer.{name}.weight"]

    def heads(states):
        return states.unflatten(-1, (2, 16)).transpose(1, 2)

    states = weights["transformer.wte.weight"][tokens] + weights["transformer.wpe.weight"]
    projected = norm(states, "h.0.ln_1") @ weights["transformer.h.0.attn.c_attn.weight"].T
    query, key, value = map(heads, projected.split(32, -1))
    scores = (query @ key.mT / 4).masked_fill(torch.ones(64, 64).triu(1).bool(), -torch.inf)
    mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    states = states + mixed @ weights["transformer.h.0.attn.c_proj.weight"].T
    inner = norm(states, "h.0.ln_2") @ weights["transformer.h.0.mlp.c_fc.weight"].T
    states = states + (inner * (1.702 * inner).sigmoid()) @ weights["transformer.h.0.mlp.c_proj.weight"].T
    expected = norm(states, "ln_f") @ weights["lm_head.weight"].T
    torch.testing.assert_close(model(tokens).logits, expected, atol=1e-4, rtol=1e-4)


def test_gpt2_block_is_transformers_own():
    config = tiny("gpt2")
    ours = initialized(config)
    torch.nn.init.normal_(ours.lm_head.weight)
    stock = GPT2LMHeadModel(GPT2Config.from_dict(config.to_dict())).eval()
    stock.load_state_dict(ours.state_dict())
    tokens = torch.randint(0, COLORS + 1, (2, 64), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(tokens).logits, stock(tokens).logits)


def test_paper_initial_values():
    config = gpt2_config(ModelConfig(layers=5, width=256, heads=4, resolution=16))
    weights = dict(initialized(config).named_parameters())
    for name, std in {
        "transformer.wte.weight": 0.02,
        "transformer.wpe.weight": 0.01,
        "transformer.h.3.attn.c_attn.weight": 1 / math.sqrt(256),
        "transformer.h.3.attn.c_proj.weight": 1 / math.sqrt(256 * 5),
        "transformer.h.3.mlp.c_fc.weight": 0.02,
        "transformer.h.3.mlp.c_proj.weight": 0.02,
    }.items():
        assert weights[name].std().item() == pytest.approx(std, rel=0.02), name
        assert weights[name].mean().item() == pytest.approx(0, abs=0.02 * std), name
    assert weights["transformer.wte.weight"][512].std().item() == pytest.approx(0.02, rel=0.2)
    assert not any(name.endswith("bias") for name in weights)
    assert all((value == 1).all() for name, value in weights.items() if ".ln_" in name)
    assert not weights["lm_head.weight"].any()


def test_gpt2_initial_values_match_transformers():
    config = gpt2_config(ModelConfig(layers=5, width=256, heads=4, resolution=16, block="gpt2"))
    stock = dict(GPT2LMHeadModel(config).named_parameters())
    for name, value in initialized(config).named_parameters():
        if name == "lm_head.weight":
            assert not value.any()
        elif stock[name].std() == 0:
            torch.testing.assert_close(value, stock[name])
        else:
            assert value.std().item() == pytest.approx(stock[name].std().item(), rel=0.03), name


def test_initial_values_depend_on_name_and_seed_alone():
    config = tiny()
    torch.manual_seed(1)
    model = initialized(config, seed=3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    for name, parameter in reversed(list(model.named_parameters())):
        assert torch.equal(parameter, initial_value(name, parameter.shape, config, seed=3))
    assert torch.equal(torch.get_rng_state(), state), "and leave the global generator alone"
    one, other = (f"transformer.h.{layer}.mlp.c_fc.weight" for layer in (0, 1))
    weights = dict(model.named_parameters())
    assert not torch.equal(weights[one], weights[other])
    assert not torch.equal(weights[one], initial_value(one, weights[one].shape, config, seed=4))


def test_building_draws_nothing():
    state = torch.get_rng_state()
    build_model(tiny())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("block", BLOCKS)
def test_config_survives_a_checkpoint(block):
    config = tiny(block)
    again = GPT2Config.from_dict(config.to_dict())
    assert (again.block, again.colors, again.bos_token_id, again.eos_token_id) == (block, COLORS, COLORS, None)
    ours, theirs = initialized(config), initialized(again)
    torch.nn.init.ones_(ours.lm_head.weight)
    torch.nn.init.ones_(theirs.lm_head.weight)
    tokens = torch.arange(64)[None] % COLORS
    assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("block", BLOCKS)
def test_activation_checkpointing_changes_no_gradient(block):
    tokens = torch.randint(0, COLORS, (2, 64), generator=torch.Generator().manual_seed(0))
    gradients = []
    for recompute in (False, True):
        model = initialized(tiny(block)).train()
        torch.nn.init.constant_(model.lm_head.weight[:8], 0.1)
        if recompute:
            recompute_blocks(model.transformer.h)
        functional.cross_entropy(model(tokens).logits.flatten(0, 1), tokens.flatten()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
