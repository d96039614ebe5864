"""Completions: a picture's first pixels go in, the model draws the rest colour by colour.

As in the paper: temperature 1, no top-k, no nucleus. Keys and values of earlier positions are kept, so that each colour
costs one position's forward pass.
"""

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from pipeline.model.decoding import Decoder

NextScores = Callable[[torch.Tensor], torch.Tensor]
"""Of SOS and the colours so far, long (B, P + 1), to the scores of the next colour, (B, V). P grows by one a call."""


def complete(
    model: nn.Module,
    prefix: torch.Tensor,
    total: int,
    *,
    seed: int,
    temperature: float = 1.0,
    first_picture: int = 0,
) -> torch.Tensor:
    """Pictures of `total` colours, long (B, total), that begin with `prefix`, integers (B, P) with 0 <= P <= total.

    temperature: divides the logits; 0 takes the most probable colour.
    first_picture: number of the first picture. Picture i draws from a generator seeded by (seed, i), one number a
    position: its colours do not depend on the pictures beside it, up to rounding, so a long list may be drawn in
    batches of any size. The keys and values take 2 * layers * B * total * width numbers.
    """
    colors = model.config.colors
    assert total <= model.config.n_positions, f"{total} asked for, {model.config.n_positions} positions"
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return _drawn(Decoder(model, total), prefix, total, colors, seed, temperature, first_picture)
    finally:
        model.train(was_training)


def complete_halves(
    model: nn.Module, tokens: np.ndarray, *, samples: int, seed: int, temperature: float = 1.0
) -> np.ndarray:
    """Draws the lower half of each picture `samples` times: tokens (B, T) to uint16 (B, samples, T)."""
    given, total = _upper_halves(tokens, samples), tokens.shape[1]
    prefix = torch.from_numpy(given).to(next(model.parameters()).device)
    drawn = complete(model, prefix, total, seed=seed, temperature=temperature)
    return drawn.cpu().numpy().astype(np.uint16).reshape(len(tokens), samples, total)


def complete_halves_by(
    next_scores: NextScores, tokens: np.ndarray, *, colors: int, samples: int, seed: int, device: torch.device
) -> np.ndarray:
    """The same for a model that is asked for scores in any other way."""
    given, total = _upper_halves(tokens, samples), tokens.shape[1]
    drawn = _drawn(next_scores, torch.from_numpy(given).to(device), total, colors, seed)
    return drawn.cpu().numpy().astype(np.uint16).reshape(len(tokens), samples, total)


def _upper_halves(tokens: np.ndarray, samples: int) -> np.ndarray:
    """int64 (B * samples, T / 2)."""
    return tokens[:, : tokens.shape[1] // 2].repeat(samples, axis=0).astype(np.int64)


def _drawn(
    next_scores: NextScores,
    prefix: torch.Tensor,
    total: int,
    colors: int,
    seed: int,
    temperature: float = 1.0,
    first_picture: int = 0,
) -> torch.Tensor:
    pictures, given = prefix.shape
    assert given <= total, f"{given} colours given, {total} asked for"
    thresholds = _thresholds(seed, first_picture, pictures, total).to(prefix.device)  # (B, total)
    tokens = torch.full((pictures, total + 1), colors, dtype=torch.long, device=prefix.device)  # SOS, then the picture
    tokens[:, 1 : given + 1] = prefix
    for position in range(given, total):
        scores = next_scores(tokens[:, : position + 1])  # (B, V)
        tokens[:, position + 1] = draw(scores, thresholds[:, position], temperature)
    return tokens[:, 1:]


def draw(logits: torch.Tensor, thresholds: torch.Tensor, temperature: float) -> torch.Tensor:
    """Colours, long (B,): where the cumulative probabilities of logits (B, V) pass `thresholds` (B,) in [0, 1)."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)  # (B, V)
    # Scaled by the last sum, which rounding keeps from being 1; right=True never takes a colour of probability 0.
    passed = torch.searchsorted(cumulative, thresholds[:, None] * cumulative[:, -1:], right=True)
    return passed.squeeze(-1).clamp(max=logits.shape[-1] - 1)


def _thresholds(seed: int, first_picture: int, pictures: int, total: int) -> torch.Tensor:
    """Uniform numbers in [0, 1), float64 (B, total): a row a picture, from its own generator."""
    rows = []
    for picture in range(first_picture, first_picture + pictures):
        digest = hashlib.sha256(f"{seed}:picture:{picture}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        rows.append(torch.rand(total, generator=generator, dtype=torch.float64, device="cpu"))
    return torch.stack(rows) if rows else torch.empty(0, total, dtype=torch.float64)
