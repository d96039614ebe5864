"""The parts of the attentive probe: token features of a frozen model, their standardization, and the pooling."""

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from data_prep.common.seeding import generator
from pipeline.evaluate.context import Evaluation, ImageSubset
from pipeline.evaluate.features.pooled import hooked_layers
from pipeline.evaluate.work_sharing import map_parts

EPSILON = 1e-6
"""Added to the variance, as in AIM's batch norm."""
IMAGES_PER_ITEM = 4096


class AttentivePooling(nn.Module):
    """A learned query over token features (B, T, D), followed by a linear classifier: see attentive_probe.py."""

    def __init__(self, width: int, classes: int, heads: int, random: np.random.Generator) -> None:
        """random: draws the initial weights as AIM's code does. The classifier's weights start at zero."""
        super().__init__()
        bound = width**-0.5
        query = 0.02 * random.standard_normal((heads, width // heads))
        key, value = random.uniform(-bound, bound, (2, heads, width // heads, width))
        self.query, self.key, self.value = (
            nn.Parameter(torch.from_numpy(initial.astype(np.float32))) for initial in (query, key, value)
        )
        self.score = nn.Parameter(torch.zeros(classes, width))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (B, C).

        Keys and values are linear, so they are applied to the query and to the pooled features. No tensor as large as
        the features is created.
        """
        scale = self.query.shape[1] ** -0.5
        query = torch.einsum("he,hed->hd", self.query, self.key) * scale  # (H, D)
        scores = torch.einsum("btd,hd->bht", features, query)
        weights = functional.softmax(scores.float(), dim=-1).to(features.dtype)  # (B, H, T)
        pooled = torch.einsum("bht,btd->bhd", weights, features)
        values = torch.einsum("bhd,hed->bhe", pooled, self.value).flatten(1)  # (B, D)
        return functional.linear(values, self.score)


class Probes(nn.Module):
    """One probe per layer and learning rate, trained in the same pass. Probes of a layer start from equal weights."""

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(
        self,
        layers: list[int],
        lrs: int,
        moments: tuple[np.ndarray, np.ndarray],
        classes: int,
        heads: int,
        seed: int,
    ) -> None:
        """moments: mean and standard deviation of each layer's features, float32 (layers, D) each."""
        super().__init__()
        self.layers = [layer for layer in layers for _ in range(lrs)]
        """The layer of each probe."""
        self._positions = [position for position in range(len(layers)) for _ in range(lrs)]
        for name, values in zip(("mean", "deviation"), moments, strict=True):
            self.register_buffer(name, torch.from_numpy(values))
        width = self.mean.shape[1]
        self.probes = nn.ModuleList(
            AttentivePooling(width, classes, heads, generator(seed, "attentive_probe", layer)) for layer in self.layers
        )

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Logits of every probe (B, K, C), from the features (B, T, D) of every layer."""
        standardised = [self._standardise(position, layer) for position, layer in enumerate(features)]
        logits = [probe(standardised[position]) for position, probe in zip(self._positions, self.probes, strict=True)]
        return torch.stack(logits, dim=1)

    def one(self, number: int, features: torch.Tensor) -> torch.Tensor:
        """Logits (B, C) of one probe, from the features (B, T, D) of its layer."""
        return self.probes[number](self._standardise(self._positions[number], features))

    def _standardise(self, position: int, features: torch.Tensor) -> torch.Tensor:
        return (features - self.mean[position]) / self.deviation[position]


@torch.no_grad()
def token_features(
    evaluation: Evaluation, tokens: torch.Tensor, indices: np.ndarray, layers: list[int], draw: int = 0
) -> list[torch.Tensor]:
    """The features of images in each layer, (B, T, D) each, by one pass of the frozen trunk.

    tokens, indices and draw are as in `Evaluation.inputs_and_targets`.
    """
    inputs, _ = evaluation.inputs_and_targets(tokens, indices, draw)  # (B, T)
    with hooked_layers(evaluation.model.model, layers, lambda normed: normed) as features:
        evaluation.model.model.transformer(inputs)
    return features


def standardisation(evaluation: Evaluation, images: ImageSubset, layers: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each layer's features over images and positions, float32 (layers, D) each.

    The images are divided among the ranks; the values do not depend on the number of ranks.
    """

    def sums(part: slice) -> dict[str, Any]:
        """Sum and sum of squares over a part of the images, float64 (layers, D) each."""
        shape, device = (2, len(layers), evaluation.model.config.n_embd), evaluation.accelerator.device
        total, squares = torch.zeros(shape, dtype=torch.float64, device=device)
        for rows, tokens in evaluation.batches_of(images, part):
            with evaluation.accelerator.autocast():
                features = token_features(evaluation, tokens, images.indices[rows], layers)
            total += torch.stack([layer.sum((0, 1), dtype=torch.float64) for layer in features])
            squares += torch.stack([layer.double().square().sum((0, 1)) for layer in features])
        return {"sum": total.cpu().numpy(), "squares": squares.cpu().numpy()}

    label = "attentive_probe, mean and deviation"
    parts = map_parts(evaluation, label, "moments-{:09d}", len(images), IMAGES_PER_ITEM, sums)
    count = len(images) * evaluation.shards.resolution**2
    mean = sum(part["sum"] for part in parts) / count  # (layers, D)
    variance = np.maximum(sum(part["squares"] for part in parts) / count - mean**2, 0)
    return mean.astype(np.float32), np.sqrt(variance + EPSILON).astype(np.float32)
