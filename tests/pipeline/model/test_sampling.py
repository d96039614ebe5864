"""Completions against drawing without a cache, and against the model's own probabilities."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config import ModelConfig
from pipeline.model import objectives
from pipeline.model.decoding import Decoder
from pipeline.model.gpt import build_model, initialize
from pipeline.model.gpt_config import BLOCKS, gpt2_config
from pipeline.model.recompute import recompute_blocks
from pipeline.model.sampling import complete, draw

COLORS, TOTAL = 16, 64


def wide_awake_model(block="igpt"):
    """A small model whose every weight matters to its logits."""
    model = build_model(gpt2_config(ModelConfig(layers=2, width=32, heads=2, resolution=8, block=block), COLORS))
    initialize(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        if block == "gpt2":
            model.lm_head.weight[COLORS] *= 50  # SOS would often win
    return model.eval()


def some_images(count=4):
    return torch.randint(0, COLORS, (count, TOTAL), generator=torch.Generator().manual_seed(2))


def drawn_without_cache(model, prefix, total, thresholds):
    tokens = prefix
    for position in range(prefix.shape[1], total):
        padded = torch.cat([tokens, tokens.new_zeros(len(tokens), total - tokens.shape[1])], dim=1)
        inputs, _ = objectives.next_color(padded, COLORS)
        with torch.no_grad():
            logits = model(inputs).logits[:, position, :COLORS]
        tokens = torch.cat([tokens, draw(logits, thresholds[:, position], 1.0)[:, None]], dim=1)
    return tokens


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("given", [0, 1, 40])
def test_equals_drawing_without_a_cache(block, given, monkeypatch):
    model, images = wide_awake_model(block), some_images()
    thresholds = torch.rand(4, TOTAL, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    monkeypatch.setattr("pipeline.model.sampling._thresholds", lambda *_: thresholds)
    expected = drawn_without_cache(model, images[:, :given], TOTAL, thresholds)
    found = complete(model, images[:, :given], TOTAL, seed=0)
    assert torch.equal(found, expected)
    assert torch.equal(found[:, :given], images[:, :given])
    assert found.min() >= 0 and found.max() < COLORS, "never SOS"
    assert len(found[:, given:].unique()) > COLORS / 2, "the model of this test should not be certain"


def test_a_picture_does_not_depend_on_its_batch():
    model, prefix = wide_awake_model(), some_images(6)[:, :20]
    together = complete(model, prefix, TOTAL, seed=5)
    apart = [complete(model, prefix[at : at + 2], TOTAL, seed=5, first_image=at) for at in (0, 2, 4)]
    assert torch.equal(together, torch.cat(apart))
    alone = [complete(model, prefix[at : at + 1], TOTAL, seed=5, first_image=at) for at in range(6)]
    assert torch.equal(together, torch.cat(alone)), "one image has another layout of the weights"
    assert torch.equal(together, complete(model, prefix, TOTAL, seed=5))
    assert not torch.equal(together, complete(model, prefix, TOTAL, seed=6))


def test_same_prefix_gives_different_images():
    prefix = some_images(1)[:, :20].repeat(3, 1)
    one, two, three = complete(wide_awake_model(), prefix, TOTAL, seed=0)
    assert not torch.equal(one, two)
    assert not torch.equal(two, three)


def test_draws_follow_the_probabilities():
    logits = torch.tensor([2.0, 0.0, -torch.inf, 1.0, -1.0])
    thresholds = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    for temperature in (1.0, 0.5):
        counts = draw(logits.expand(100_000, 5), thresholds, temperature).bincount(minlength=5)
        torch.testing.assert_close(counts / 100_000, (logits / temperature).softmax(-1), atol=2e-5, rtol=0)


def test_thresholds_at_their_ends_draw_possible_colors():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).repeat(2, 1)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, ends, 1.0).tolist() == [1, 2]


def test_temperature_zero_takes_the_most_probable():
    model, prefix = wide_awake_model(), some_images()[:, :40]
    found = complete(model, prefix, TOTAL, seed=0, temperature=0)
    inputs, targets = objectives.next_color(found, COLORS)
    assert torch.equal(model(inputs).logits.argmax(-1)[:, 40:], targets[:, 40:])


def test_works_in_training_with_activation_checkpointing_and_leaves_the_mode():
    model, prefix = wide_awake_model(), some_images()[:, :40]
    expected = complete(model, prefix, TOTAL, seed=0)
    recompute_blocks(model.transformer.h)
    model.train()
    assert torch.equal(complete(model, prefix, TOTAL, seed=0), expected)
    assert model.training


def test_half_precision_and_uint16_prefixes():
    prefix = some_images()[:, :40].to(torch.uint16)
    found = complete(wide_awake_model().bfloat16(), prefix, TOTAL, seed=0)
    assert found.shape == (4, TOTAL)
    assert torch.equal(found[:, :40], prefix.long())


@pytest.mark.parametrize("block", BLOCKS)
def test_the_pass_that_cuda_records_gives_the_scores_of_the_other(block):
    model = wide_awake_model(block)
    tokens = torch.cat([torch.full((4, 1), COLORS), some_images()], dim=1)
    plain, recorded = Decoder(model, TOTAL), Decoder(model, TOTAL)
    with torch.no_grad():
        torch.testing.assert_close(recorded(tokens[:, :10]), plain(tokens[:, :10]))
        for place in (10, 11, 12):
            expected = plain(tokens[:, : place + 1])
            # Twice, as the recording passes once before it: what is known of a place is written over.
            for _ in range(2):
                found = recorded._pass(tokens[:, place : place + 1], torch.tensor([place]), None)
            torch.testing.assert_close(found, expected)


def test_a_pass_makes_one_mask_for_all_layers():
    made: list[str] = []

    class Masks(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            made.extend(
                str(function) for each in arguments if isinstance(each, torch.Tensor) and each.dtype == torch.bool
            )
            return function(*arguments, **(keywords or {}))

    decoder, position = Decoder(wide_awake_model(), TOTAL), torch.tensor([10])
    with torch.no_grad():
        decoder(torch.full((4, 10), COLORS))
        with Masks():
            decoder._pass(torch.full((4, 1), COLORS), position, None)
    assert len(made) == 1, made


def test_nothing_to_draw():
    images = some_images()
    assert torch.equal(complete(wide_awake_model(), images, TOTAL, seed=0), images)
