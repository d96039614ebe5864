"""What a model learns: the next colour of a picture read in raster order, or hidden colours from all others; and, when
it learns classes too, both at once, or what a teacher says of a picture.

A hidden colour carries the bit HIDDEN on its way from the data order, which draws it, to the model.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional

from pipeline.config import ObjectiveConfig

HIDDEN = 1 << 15
"""The bit of a uint16 token that is to be predicted under the masked objective."""
IGNORED = -100
"""A target that takes no part in the loss."""

InputsAndTargets = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
"""Of pictures, integers (B, T), and the number of colours V, to the model's inputs and targets, both long (B, T)."""


def inputs_and_targets(objective: ObjectiveConfig) -> InputsAndTargets:
    """What the model reads and what it is to say, for an objective."""
    return {"next_color": next_color, "masked_color": masked_color}[objective.kind]


def next_color(tokens: torch.Tensor, sos: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [SOS, x0 .. x(T-2)] and targets [x0 .. x(T-1)] of pictures `tokens`, integers (B, T); both long (B, T)."""
    targets = tokens.long()  # (B, T)
    start = targets.new_full((len(targets), 1), sos)  # (B, 1)
    return torch.cat([start, targets[:, :-1]], dim=1), targets


def masked_color(tokens: torch.Tensor, mask: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs with `mask` for each hidden colour, and targets that are hidden colours or IGNORED; both long (B, T)."""
    hidden = tokens >= HIDDEN  # (B, T)
    colors = torch.where(hidden, tokens - HIDDEN, tokens).long()
    return colors.masked_fill(hidden, mask), colors.masked_fill(~hidden, IGNORED)


def hide(tokens: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """uint16 (B, T) with the bit HIDDEN where bool (B, T) `hidden` says so; of each picture at least one is True."""
    assert tokens.dtype == np.uint16 and hidden.any(axis=1).all()
    return tokens | (hidden.astype(np.uint16) * np.uint16(HIDDEN))


def is_hidden(tokens: np.ndarray) -> np.ndarray:
    """Which tokens, uint16, carry the bit HIDDEN."""
    return tokens >= HIDDEN


def picture_loss(logits: torch.Tensor, targets: torch.Tensor, colors: int) -> torch.Tensor:
    """Mean nats of each picture's targets, fp32 (B,); arguments as for `per_token_loss`, targets may be IGNORED."""
    taking_part = (targets != IGNORED).sum(1)  # (B,)
    return per_token_loss(logits, targets, colors).sum(1) / taking_part


def per_token_loss(logits: torch.Tensor, targets: torch.Tensor, colors: int) -> torch.Tensor:
    """Cross-entropy of each token in nats, fp32 (B, T); 0 where the target is IGNORED.

    `logits` is (B, T, V) or has columns beyond the colours (the stock block's SOS), which take no part;
    `targets` is long (B, T).
    """
    scores = logits[..., :colors].float().flatten(0, 1)  # (B * T, V): in this layout five times as fast as (B, V, T)
    nats = functional.cross_entropy(scores, targets.flatten(), reduction="none", ignore_index=IGNORED)
    return nats.view(targets.shape)


def token_loss(logits: torch.Tensor, targets: torch.Tensor, colors: int) -> torch.Tensor:
    """Mean cross-entropy over all tokens, in nats: an fp32 scalar. Arguments as for `per_token_loss`."""
    scores = logits[..., :colors].float()  # (B, T, V)
    return functional.cross_entropy(scores.flatten(0, 1), targets.flatten())


def joint_loss(
    token_logits: torch.Tensor,
    targets: torch.Tensor,
    class_logits: torch.Tensor,
    labels: torch.Tensor,
    colors: int,
    generative_weight: float = 1.0,
) -> torch.Tensor:
    """Generative and class loss of each picture in nats, fp32 (B,): what fine-tuning lowers (the paper's section 2.3).

    `token_logits`, `targets` and `colors` as for `picture_loss`; `class_logits` is (B, C), `labels` long (B,).
    """
    generative = picture_loss(token_logits, targets, colors)  # (B,)
    return generative_weight * generative + class_loss(class_logits, labels)


def class_loss(class_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each picture's class in nats, fp32 (B,); `class_logits` (B, C), `labels` long (B,)."""
    return functional.cross_entropy(class_logits.float(), labels, reduction="none")


def softened_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Cross-entropy of two softened distributions over classes, - sum p_teacher ln p_student, in nats: fp32 (B,).

    Both are logits (B, C), divided by the temperature before their softmax: the distillation loss of SimCLRv2 (Chen et
    al. 2020b, section 2), which knows no labels.
    """
    wanted = functional.softmax(teacher.float() / temperature, dim=1)  # (B, C)
    return functional.cross_entropy(student.float() / temperature, wanted, reduction="none")
