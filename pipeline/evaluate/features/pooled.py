"""Pooled features of every layer, computed in one forward pass over a split and cached on disk.

The layers are those of model/layer_features.py. The sequence is the one of training, [SOS, x0 .. x(n-2)]; without SOS
every color would be at the wrong position.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from data_prep.common.files import json_digest
from pipeline.evaluate.cache import TaskCache, Write
from pipeline.evaluate.context import Evaluation, ImageSubset
from pipeline.model.layer_features import layer_norms, observed_layers, pooled


@contextmanager
def hooked_layers(
    model: nn.Module, layers: Sequence[int], take: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[list[torch.Tensor]]:
    """Context in which each forward pass fills the yielded list with `take(features)` of each of these layers.

    take: a function of a layer's features (B, T, D) after its norm.
    """
    taken = [torch.empty(0)] * len(layers)

    def store(layer: int, normed: torch.Tensor) -> None:
        taken[layers.index(layer)] = take(normed)

    with observed_layers(model, layers, store):
        yield taken


@contextmanager
def pooled_layers(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Context in which each forward pass of `model` fills the yielded list with L+1 tensors (B, D), fp32."""
    with hooked_layers(model, range(len(layer_norms(model))), pooled) as features:
        yield features


def pooled_features(evaluation: Evaluation, images: ImageSubset, draw: int = 0) -> np.ndarray:
    """Features of every layer: float32 (L+1, N, D), a memory map that every rank reads. All ranks call it.

    draw: which pixels are masked, for a masked model. The file (4 * (L+1) * N * D bytes) is in `evaluation.features`,
    which must be on a file system that all ranks share. Its name has a digest of the model, the images and everything
    else that the features depend on. Each rank computes and writes its own batches; the values do not depend on the
    number of ranks. Raises ValueError if features are NaN or Inf.
    """
    config, facts = evaluation.model.config, _facts(evaluation, images, draw)

    def fill(write: Write, done: set[int]) -> None:
        model = evaluation.model.model
        with torch.inference_mode(), evaluation.accelerator.autocast(), pooled_layers(model) as layers:
            for rows, tokens in evaluation.batches(images, f"features of {images.split.name}", done):
                inputs, _ = evaluation.inputs_and_targets(tokens, images.indices[rows], draw)  # (B, T)
                model.transformer(inputs)
                features = torch.stack(layers)  # (L+1, B, D)
                if not torch.isfinite(features).all():
                    raise ValueError(
                        f"the model's features are NaN or Inf on images of {images.split.name}; evaluate another "
                        f"checkpoint, or in fp32 if --precision is bf16."
                    )
                write(rows.start, features.cpu().numpy())

    name = f"{images.split.name}-{json_digest(facts)[:16]}"
    return TaskCache(evaluation.features).array(name, (config.n_layer + 1, len(images), config.n_embd), facts, fill)


def _facts(evaluation: Evaluation, images: ImageSubset, draw: int) -> dict[str, object]:
    """Everything that the features depend on."""
    return {
        "model_digest": evaluation.model_digest,
        "dataset_digest": evaluation.shards.digest,
        "split": images.split.name,
        "pictures": hashlib.sha256(images.indices.tobytes()).hexdigest(),
        "precision": str(evaluation.accelerator.mixed_precision),
        "batch_size": evaluation.sizes.batch_size,
        "draw": [evaluation.seed, draw] if evaluation.masked else None,
    }
