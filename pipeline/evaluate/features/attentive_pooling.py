"""The parts of the attentive probe: token features of a frozen model, how they are standardised, and the pooling."""

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
    """A learned query over token features (B, T, D), and a linear classifier: see attentive_probe.py."""

    def __init__(self, width: int, classes: int, heads: int, random: np.random.Generator) -> None:
        """random: draws the initial weights as AIM's code does; the classifier begins at zero, as class heads here."""
        super().__init__()
        bound = width**-0.5
        query = 0.02 * random.standard_normal((heads, width // heads))
        key, value = random.uniform(-bound, bound, (2, heads, width // heads, width))
        self.query, self.key, self.value = (
            nn.Parameter(torch.from_numpy(initial.astype(np.float32))) for initial in (query, key, value)
        )
        self.score = nn.Parameter(torch.zeros(classes, width))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (B, C). Keys and values are linear, so they are applied to the query and to what was pooled: nothing
        as large as the features is made."""
        scale = self.query.shape[1] ** -0.5
        asked = torch.einsum("he,hed->hd", self.query, self.key) * scale  # (H, D)
        scores = torch.einsum("btd,hd->bht", features, asked)
        weights = functional.softmax(scores.float(), dim=-1).to(features.dtype)  # (B, H, T)
        pooled = torch.einsum("bht,btd->bhd", weights, features)
        values = torch.einsum("bhd,hed->bhe", pooled, self.value).flatten(1)  # (B, D)
        return functional.linear(values, self.score)


class Probes(nn.Module):
    """A probe for each layer and rate, over the features of the same pass; all rates of a layer begin alike."""

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(
        self, layers: list[int], rates: int, moments: tuple[np.ndarray, np.ndarray], classes: int, heads: int, seed: int
    ) -> None:
        """moments: mean and deviation of each layer's features, float32 (layers, D) each."""
        super().__init__()
        self.layers = [layer for layer in layers for _ in range(rates)]
        """The layer of each probe."""
        self._places = [place for place in range(len(layers)) for _ in range(rates)]
        for name, values in zip(("mean", "deviation"), moments, strict=True):
            self.register_buffer(name, torch.from_numpy(values))
        width = self.mean.shape[1]
        self.probes = nn.ModuleList(
            AttentivePooling(width, classes, heads, generator(seed, "attentive_probe", layer)) for layer in self.layers
        )

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Logits of every probe (B, K, C), of the features (B, T, D) of every layer."""
        standardised = [self._standardise(place, of_layer) for place, of_layer in enumerate(features)]
        logits = [probe(standardised[place]) for place, probe in zip(self._places, self.probes, strict=True)]
        return torch.stack(logits, dim=1)

    def one(self, number: int, features: torch.Tensor) -> torch.Tensor:
        """Logits (B, C) of one probe, of the features (B, T, D) of its layer."""
        return self.probes[number](self._standardise(self._places[number], features))

    def _standardise(self, place: int, features: torch.Tensor) -> torch.Tensor:
        return (features - self.mean[place]) / self.deviation[place]


@torch.no_grad()
def token_features(
    evaluation: Evaluation, tokens: torch.Tensor, indices: np.ndarray, layers: list[int], draw: int = 0
) -> list[torch.Tensor]:
    """Each layer's features of images, (B, T, D) each, by one pass of the frozen trunk.

    tokens, indices and draw as of `Evaluation.inputs_and_targets`.
    """
    inputs, _ = evaluation.inputs_and_targets(tokens, indices, draw)  # (B, T)
    with hooked_layers(evaluation.model.model, layers, lambda normed: normed) as features:
        evaluation.model.model.transformer(inputs)
    return features


def standardisation(evaluation: Evaluation, images: ImageSubset, layers: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each layer's features over images and positions, float32 (layers, D) each.

    The images are divided among the ranks; the numbers do not depend on how many there are.
    """

    def sums(part: slice) -> dict[str, Any]:
        """Sum and sum of squares over some images, float64 (layers, D) each."""
        shape, device = (2, len(layers), evaluation.model.config.n_embd), evaluation.accelerator.device
        total, squares = torch.zeros(shape, dtype=torch.float64, device=device)
        for place, tokens in evaluation.batches_of(images, part):
            with evaluation.accelerator.autocast():
                features = token_features(evaluation, tokens, images.indices[place], layers)
            total += torch.stack([of_layer.sum((0, 1), dtype=torch.float64) for of_layer in features])
            squares += torch.stack([of_layer.double().square().sum((0, 1)) for of_layer in features])
        return {"sum": total.cpu().numpy(), "squares": squares.cpu().numpy()}

    label = "attentive_probe, mean and deviation"
    done = map_parts(evaluation, label, "moments-{:09d}", len(images), IMAGES_PER_ITEM, sums)
    count = len(images) * evaluation.shards.resolution**2
    mean = sum(part["sum"] for part in done) / count  # (layers, D)
    variance = np.maximum(sum(part["squares"] for part in done) / count - mean**2, 0)
    return mean.astype(np.float32), np.sqrt(variance + EPSILON).astype(np.float32)
