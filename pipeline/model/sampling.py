"""Completions: a picture's first pixels go in, the model draws the rest colour by colour.

As in the paper: temperature 1, no top-k, no nucleus. Keys and values of earlier positions are kept, so that each colour
costs one position's forward pass.
"""

import hashlib

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer


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
    pictures, given = prefix.shape
    config, device = model.config, prefix.device
    assert given <= total <= config.n_positions, (
        f"{given} colours given, {total} asked for, {config.n_positions} positions"
    )
    thresholds = _thresholds(seed, first_picture, pictures, total).to(device)  # (B, total)
    tokens = torch.full((pictures, total + 1), config.colors, dtype=torch.long, device=device)  # SOS, then the picture
    tokens[:, 1 : given + 1] = prefix
    cache = Cache(layers=[_PreallocatedLayer(total) for _ in range(config.n_layer)])
    seen = 0
    was_training = model.training
    model.eval()  # GPT-2 ignores the cache while it trains with activation checkpointing
    try:
        with torch.no_grad():
            for position in range(given, total):
                new = tokens[:, seen : position + 1]  # at first SOS and the prefix, then one colour
                output = model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1)
                scores = output.logits[:, -1, : config.colors]  # (B, V)
                tokens[:, position + 1] = draw(scores, thresholds[:, position], temperature)
                seen = position + 1
    finally:
        model.train(was_training)
    return tokens[:, 1:]


def complete_halves(
    model: nn.Module, tokens: np.ndarray, *, samples: int, seed: int, temperature: float = 1.0
) -> np.ndarray:
    """Draws the lower half of each picture `samples` times: tokens (B, T) to uint16 (B, samples, T)."""
    pictures, positions = tokens.shape
    device = next(model.parameters()).device
    given = tokens[:, : positions // 2].repeat(samples, axis=0).astype(np.int64)  # (B * samples, T / 2)
    drawn = complete(model, torch.from_numpy(given).to(device), positions, seed=seed, temperature=temperature)
    return drawn.cpu().numpy().astype(np.uint16).reshape(pictures, samples, positions)


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


class _PreallocatedLayer(DynamicLayer):
    """One layer's keys and values in memory for `capacity` positions: nothing is copied as it fills.

    transformers' DynamicLayer copies everything at every position; its StaticLayer attends to the empty positions too,
    under a mask that keeps the fused kernels away.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        images, heads, _, head_width = key_states.shape
        self.memory = key_states.new_empty(2, images, heads, self.capacity, head_width)
        self.keys, self.values = self.memory[..., :0, :]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds (B, H, new, D/H) to each; returns all so far, (B, H, seen + new, D/H)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        self.memory[0, :, :, start:end] = key_states
        self.memory[1, :, :, start:end] = value_states
        self.keys, self.values = self.memory[..., :end, :]
        return self.keys, self.values
