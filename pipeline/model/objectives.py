"""What a model learns: the next colour of a picture read in raster order."""

import torch
from torch.nn import functional


def next_color(tokens: torch.Tensor, sos: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [SOS, x0 .. x(T-2)] and targets [x0 .. x(T-1)] of pictures `tokens`, integers (B, T); both long (B, T)."""
    targets = tokens.long()  # (B, T)
    start = targets.new_full((len(targets), 1), sos)  # (B, 1)
    return torch.cat([start, targets[:, :-1]], dim=1), targets


def per_token_loss(logits: torch.Tensor, targets: torch.Tensor, colors: int) -> torch.Tensor:
    """Cross-entropy of each token in nats, fp32 (B, T).

    `logits` is (B, T, V) or has columns beyond the colours (the stock block's SOS), which take no part;
    `targets` is long (B, T).
    """
    scores = logits[..., :colors].float()  # (B, T, V)
    return functional.cross_entropy(scores.transpose(1, 2), targets, reduction="none")  # (B, T)


def token_loss(logits: torch.Tensor, targets: torch.Tensor, colors: int) -> torch.Tensor:
    """Mean cross-entropy over all tokens, in nats: an fp32 scalar. Arguments as for `per_token_loss`."""
    scores = logits[..., :colors].float()  # (B, T, V)
    return functional.cross_entropy(scores.flatten(0, 1), targets.flatten())
