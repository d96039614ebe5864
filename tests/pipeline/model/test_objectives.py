"""The objective against its definition in numpy."""

import numpy as np
import torch

from pipeline.model.objectives import next_color, per_token_loss, token_loss


def test_next_color_shifts_by_one_behind_sos():
    tokens = torch.from_numpy(np.array([[5, 6, 7], [1, 2, 3]], dtype=np.uint16))  # as shards hold them
    inputs, targets = next_color(tokens, 9)
    assert inputs.tolist() == [[9, 5, 6], [9, 1, 2]]
    assert targets.tolist() == [[5, 6, 7], [1, 2, 3]]
    assert inputs.dtype == targets.dtype == torch.long


def test_losses_are_nats_of_the_colors():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(3, 5, 8))  # two columns beyond six colours
    targets = generator.integers(0, 6, (3, 5))
    scores = np.exp(logits[..., :6])
    chosen = np.take_along_axis(scores / scores.sum(-1, keepdims=True), targets[..., None], -1)[..., 0]
    each = per_token_loss(torch.tensor(logits), torch.tensor(targets), 6)
    np.testing.assert_allclose(each.numpy(), -np.log(chosen), rtol=1e-5)
    mean = token_loss(torch.tensor(logits), torch.tensor(targets), 6)
    np.testing.assert_allclose(mean.item(), -np.log(chosen).mean(), rtol=1e-5)


def test_half_precision_logits_are_widened():
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.zeros(2, 3, dtype=torch.long)
    assert per_token_loss(logits, targets, 4).dtype == torch.float32
    assert torch.equal(token_loss(logits, targets, 4), token_loss(logits.float(), targets, 4))
