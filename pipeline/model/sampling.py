"""Completions: the first pixels of an image are given, and the model samples the rest color by color.

As in the paper: temperature 1, no top-k, no nucleus sampling. Keys and values of earlier positions are cached, so each
color costs the forward pass of one position.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import nn

from pipeline.model.decoding import Decoder
from pipeline.model.numerics import any_kernels
from pipeline.model.seeding import torch_generator

NextScores = Callable[[torch.Tensor], torch.Tensor]
"""Maps SOS and the colors so far, long (B, P + 1), to scores of the next color, (B, V). P grows by one per call."""


def complete(
    model: nn.Module,
    prefix: torch.Tensor,
    total: int,
    *,
    seed: int,
    temperature: float = 1.0,
    first_image: int = 0,
) -> torch.Tensor:
    """Images of `total` colors, long (B, total), that start with `prefix`, integers (B, P) with 0 <= P <= total.

    temperature: divides the logits; 0 takes the most probable color.
    first_image: number of the first image. Image i has a generator seeded by (seed, i), with one number for each
    position. So its colors do not depend on the other images of the batch, up to rounding, and batches may have any
    size. The key-value cache has 2 * layers * B * total * width elements.
    """
    colors = model.config.colors
    assert total <= model.config.n_positions, f"{total} asked for, {model.config.n_positions} positions"
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return _drawn(Decoder(model, total), prefix, total, colors, seed, temperature, first_image)
    finally:
        model.train(was_training)


def complete_halves(
    model: nn.Module, tokens: np.ndarray, *, samples: int, seed: int, temperature: float = 1.0
) -> np.ndarray:
    """Samples the lower half of each image `samples` times: tokens (B, T) to uint16 (B, samples, T)."""
    draw_rest = partial(complete, model, total=tokens.shape[1], seed=seed, temperature=temperature)
    return _complete_halves(draw_rest, tokens, samples, next(model.parameters()).device)


def complete_halves_by(
    next_scores: NextScores, tokens: np.ndarray, *, colors: int, samples: int, seed: int, device: torch.device
) -> np.ndarray:
    """The same for a model given as a function from tokens to scores."""
    draw_rest = partial(_drawn, next_scores, total=tokens.shape[1], colors=colors, seed=seed)
    return _complete_halves(draw_rest, tokens, samples, device)


def _complete_halves(
    draw_rest: Callable[[torch.Tensor], torch.Tensor], tokens: np.ndarray, samples: int, device: torch.device
) -> np.ndarray:
    """draw_rest: maps upper halves, long (B * samples, T / 2), to images, long (B * samples, T)."""
    images, total = tokens.shape
    upper = tokens[:, : total // 2].repeat(samples, axis=0).astype(np.int64)
    drawn = draw_rest(torch.from_numpy(upper).to(device))
    return drawn.cpu().numpy().astype(np.uint16).reshape(images, samples, total)


def _drawn(
    next_scores: NextScores,
    prefix: torch.Tensor,
    total: int,
    colors: int,
    seed: int,
    temperature: float = 1.0,
    first_image: int = 0,
) -> torch.Tensor:
    images, given = prefix.shape
    assert given <= total, f"{given} colors given, {total} asked for"
    thresholds = _thresholds(seed, first_image, images, total).to(prefix.device)  # (B, total)
    tokens = torch.full((images, total + 1), colors, dtype=torch.long, device=prefix.device)  # SOS, then the image
    tokens[:, 1 : given + 1] = prefix
    with any_kernels():  # torch counts cumsum on CUDA as nondeterministic
        for position in range(given, total):
            scores = next_scores(tokens[:, : position + 1])  # (B, V)
            tokens[:, position + 1] = draw(scores, thresholds[:, position], temperature)
    return tokens[:, 1:]


def draw(logits: torch.Tensor, thresholds: torch.Tensor, temperature: float) -> torch.Tensor:
    """Samples colors, long (B,): where cumulative probabilities of logits (B, V) exceed `thresholds` (B,) in [0, 1)."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)  # (B, V)
    # Scaled by the last sum, which is not exactly 1 after rounding. right=True never takes a color of probability 0.
    passed = torch.searchsorted(cumulative, thresholds[:, None] * cumulative[:, -1:], right=True)
    return passed.squeeze(-1).clamp(max=logits.shape[-1] - 1)


def _thresholds(seed: int, first_image: int, images: int, total: int) -> torch.Tensor:
    """Uniform numbers in [0, 1), float64 (B, total): one row for each image, from the image's own generator."""
    rows = []
    for image in range(first_image, first_image + images):
        generator = torch_generator(f"{seed}:picture:{image}")
        rows.append(torch.rand(total, generator=generator, dtype=torch.float64, device="cpu"))
    return torch.stack(rows) if rows else torch.empty(0, total, dtype=torch.float64)
