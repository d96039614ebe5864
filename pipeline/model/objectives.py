"""The objectives: the next color in raster order, masked pixels, classes in addition, and distillation."""

import torch
from torch.nn import functional

IGNORED = -100
"""A target that is excluded from the loss."""


def inputs_and_targets(
    tokens: torch.Tensor, masked: torch.Tensor | None, colors: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of the model, both long (B, T): for masked pixels if `masked` is given, else the next color.

    tokens: integers (B, T); masked: bool (B, T); colors: V, also the token of SOS and of masked pixels.
    """
    return next_color(tokens, colors) if masked is None else masked_color(tokens, masked, colors)


def next_color(tokens: torch.Tensor, sos: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [SOS, x0 .. x(T-2)] and targets [x0 .. x(T-1)] of images `tokens`, integers (B, T); both long (B, T)."""
    targets = tokens.long()  # (B, T)
    start = targets.new_full((len(targets), 1), sos)  # (B, 1)
    return torch.cat([start, targets[:, :-1]], dim=1), targets


def masked_color(tokens: torch.Tensor, masked: torch.Tensor, mask: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs with `mask` for each masked pixel, and targets that are masked pixels or IGNORED; both long (B, T).

    tokens: integers (B, T); masked: bool (B, T), at least one True in each image.
    """
    targets = tokens.long()  # (B, T)
    return targets.masked_fill(masked, mask), targets.masked_fill(~masked, IGNORED)


def image_loss(logits: torch.Tensor, targets: torch.Tensor, colors: int) -> torch.Tensor:
    """Mean nats of each image's targets, fp32 (B,); arguments as for `per_token_loss`, targets may be IGNORED."""
    counted = (targets != IGNORED).sum(1)  # (B,)
    return per_token_loss(logits, targets, colors).sum(1) / counted


def per_token_loss(logits: torch.Tensor, targets: torch.Tensor, colors: int) -> torch.Tensor:
    """Cross-entropy of each token in nats, fp32 (B, T); 0 where the target is IGNORED.

    `logits` is (B, T, V), or has additional columns (the gpt2 block's SOS), which are ignored;
    `targets` is long (B, T).
    """
    scores = logits[..., :colors].float().flatten(0, 1)  # (B * T, V): five times as fast as (B, V, T)
    nats = functional.cross_entropy(scores, targets.flatten(), reduction="none", ignore_index=IGNORED)
    return nats.view(targets.shape)


def joint_loss(
    token_logits: torch.Tensor,
    targets: torch.Tensor,
    class_logits: torch.Tensor,
    labels: torch.Tensor,
    colors: int,
    generative_weight: float = 1.0,
) -> torch.Tensor:
    """Generative plus class loss of each image in nats, fp32 (B,): the loss of fine-tuning (the paper's section 2.3).

    `token_logits`, `targets` and `colors` as for `image_loss`; `class_logits` is (B, C), `labels` long (B,).
    """
    generative = image_loss(token_logits, targets, colors)  # (B,)
    return generative_weight * generative + class_loss(class_logits, labels)


def class_loss(class_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each image's class in nats, fp32 (B,); `class_logits` (B, C), `labels` long (B,)."""
    return functional.cross_entropy(class_logits.float(), labels, reduction="none")


def softened_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Cross-entropy of two softened distributions over classes, - sum p_teacher ln p_student, in nats: fp32 (B,).

    Both are logits (B, C), divided by the temperature before the softmax: the distillation loss of SimCLRv2 (Chen et
    al. 2020b, section 2), which uses no labels.
    """
    wanted = functional.softmax(teacher.float() / temperature, dim=1)  # (B, C)
    return functional.cross_entropy(student.float() / temperature, wanted, reduction="none")
