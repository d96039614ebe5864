"""The objectives against their definitions in numpy."""

import numpy as np
import pytest
import torch

from pipeline.model.objectives import (
    IGNORED,
    image_loss,
    inputs_and_targets,
    joint_loss,
    next_color,
    per_token_loss,
    softened_loss,
)


def test_next_color_shifts_by_one_behind_sos():
    tokens = torch.from_numpy(np.array([[5, 6, 7], [1, 2, 3]], dtype=np.uint16))  # as shards hold them
    inputs, targets = next_color(tokens, 9)
    assert inputs.tolist() == [[9, 5, 6], [9, 1, 2]]
    assert targets.tolist() == [[5, 6, 7], [1, 2, 3]]
    assert inputs.dtype == targets.dtype == torch.long


def test_losses_are_nats_of_the_colors():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(3, 5, 8))  # two columns beyond six colors
    targets = generator.integers(0, 6, (3, 5))
    scores = np.exp(logits[..., :6])
    chosen = np.take_along_axis(scores / scores.sum(-1, keepdims=True), targets[..., None], -1)[..., 0]
    each = per_token_loss(torch.tensor(logits), torch.tensor(targets), 6)
    np.testing.assert_allclose(each.numpy(), -np.log(chosen), rtol=1e-5)
    images = image_loss(torch.tensor(logits), torch.tensor(targets), 6)
    np.testing.assert_allclose(images.numpy(), -np.log(chosen).mean(1), rtol=1e-5)


def test_masked_pixels_alone_are_predicted_and_hidden():
    tokens = torch.tensor([[3, 1, 4], [1, 5, 9]])
    masked = torch.tensor([[False, True, True], [True, False, False]])
    inputs, targets = inputs_and_targets(tokens, masked, 512)
    assert inputs.tolist() == [[3, 512, 512], [512, 5, 9]]
    assert targets.tolist() == [[IGNORED, 1, 4], [1, IGNORED, IGNORED]]
    assert inputs.dtype == targets.dtype == torch.long


def test_half_precision_logits_are_widened():
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.zeros(2, 3, dtype=torch.long)
    assert per_token_loss(logits, targets, 4).dtype == torch.float32
    assert torch.equal(image_loss(logits, targets, 4), image_loss(logits.float(), targets, 4))


def in_float64(logits: torch.Tensor) -> np.ndarray:
    """ln of the softmax over the last axis, from the definition."""
    scores = logits.double().numpy()
    scores = scores - scores.max(-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize("partial", [False, True])
def test_the_joint_loss_is_colors_and_class_in_nats(weight: float, partial: bool) -> None:
    random = torch.Generator().manual_seed(0)
    token_logits, class_logits = torch.randn(4, 6, 9, generator=random), 3 * torch.randn(4, 5, generator=random)
    targets, labels = torch.randint(9, (4, 6), generator=random), torch.tensor([0, 4, 2, 2])
    masked = np.ones((4, 6), bool)
    if partial:
        masked = np.random.default_rng(0).random((4, 6)) < 0.5
        masked[:, 0] = True
        targets = targets.masked_fill(torch.from_numpy(~masked), IGNORED)
    of_colors = -np.take_along_axis(in_float64(token_logits), np.maximum(targets.numpy(), 0)[..., None], -1)[..., 0]
    of_class = -in_float64(class_logits)[np.arange(4), labels.numpy()]
    expected = weight * (of_colors * masked).sum(1) / masked.sum(1) + of_class
    found = joint_loss(token_logits, targets, class_logits, labels, 9, weight)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_a_student_is_compared_with_the_softened_teacher() -> None:
    random = torch.Generator().manual_seed(0)
    student, teacher = 4 * torch.randn(2, 7, 5, generator=random)
    for temperature in (0.5, 1.0, 4.0):
        expected = -(np.exp(in_float64(teacher / temperature)) * in_float64(student / temperature)).sum(1)
        np.testing.assert_allclose(softened_loss(student, teacher, temperature).numpy(), expected, rtol=1e-5)
    entropy = softened_loss(teacher, teacher, 2.0)
    assert (entropy < softened_loss(student, teacher, 2.0)).all()  # nothing is nearer to it than itself
