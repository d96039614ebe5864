"""How far completed pictures are from true ones: the Fréchet distance, with what bounds it from both sides.

A split is halved at random. Pictures of the first half are completed, one sample each, and compared with as many of the
other half. From the same other half are measured: the originals that were completed, which no completion can beat but
by chance, and the originals with the colours of their lower halves in random order: the right colours, and no order.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.common.seeding import generator
from data_prep.palette.codec import decode
from pipeline.evaluate.context import Evaluation
from pipeline.evaluate.metrics.feature_network import FeatureNetwork, feature_network
from pipeline.evaluate.metrics.frechet import Gaussian, frechet_distance
from pipeline.evaluate.work_sharing import WorkItem, map_over_ranks
from pipeline.model.sampling import complete

FEWEST = 2
COMPLETED, ORIGINAL, SHUFFLED, OTHER = SETS = ("completed", "original", "shuffled", "other")


def completion_distance(
    evaluation: Evaluation, split_name: str, images: int, temperature: float, network_file: str | None
) -> dict[str, Any]:
    """The distances, the same on every rank. Raises ValueError if the split has too few pictures.

    images: completed pictures; half the split if it has not twice as many. Keys: `network`, `images`, and squared
    distances to the other half: `completions`, `originals` (the floor), `shuffled_lower_halves` (the ceiling);
    `completions_to_their_originals` compares with the very pictures that were completed.
    """
    images = compared(evaluation, split_name, images)
    split = evaluation.shards.split(split_name)
    chosen = generator(evaluation.seed, "completion distance", split_name).permutation(split.images)
    halves = np.stack([chosen[:images], chosen[images : 2 * images]])  # completed, other
    network = feature_network(None if network_file is None else Path(network_file), evaluation.accelerator.device)
    features = _features(evaluation, split_name, halves, temperature, network)
    gaussians = {name: Gaussian.of(features[name]) for name in SETS}
    return {
        "network": network.name,
        "images": images,
        "completions": frechet_distance(gaussians[COMPLETED], gaussians[OTHER]),
        "originals": frechet_distance(gaussians[ORIGINAL], gaussians[OTHER]),
        "shuffled_lower_halves": frechet_distance(gaussians[SHUFFLED], gaussians[OTHER]),
        "completions_to_their_originals": frechet_distance(gaussians[COMPLETED], gaussians[ORIGINAL]),
    }


def compared(evaluation: Evaluation, split_name: str, images: int) -> int:
    """How many pictures are compared. Raises ValueError if the split has too few."""
    split = evaluation.shards.split(split_name)
    images = min(images, split.images // 2)
    if images < FEWEST:
        raise ValueError(
            f"{evaluation.shards.path} has {split.images} pictures in its split {split_name}, too few for a distance; "
            f"set completions.distance_images 0."
        )
    return images


def _features(
    evaluation: Evaluation, split_name: str, halves: np.ndarray, temperature: float, network: FeatureNetwork
) -> dict[str, np.ndarray]:
    """Features of the four sets, float32 (N, F) each; batches are divided among the ranks and cached."""
    size = evaluation.sizes.batch_size
    items: dict[str, WorkItem] = {
        f"distance-{start}": partial(
            _batch_features, evaluation, split_name, halves[:, start : start + size], start, temperature, network
        )
        for start in range(0, halves.shape[1], size)
    }
    parts = map_over_ranks(evaluation, "completions compared", items, arrays=True).values()
    return {name: np.concatenate([part[name] for part in parts]) for name in SETS}


def _batch_features(
    evaluation: Evaluation,
    split_name: str,
    places: np.ndarray,
    start: int,
    temperature: float,
    network: FeatureNetwork,
) -> dict[str, np.ndarray]:
    shards = evaluation.shards
    originals, others = (shards.split(split_name).gather(indices)[0] for indices in places)  # (B, T) each
    half = originals.shape[1] // 2
    prefix = evaluation.on_device(originals[:, :half])
    with evaluation.accelerator.autocast():
        completed = complete(
            evaluation.model.model,
            prefix,
            originals.shape[1],
            seed=evaluation.seed,
            temperature=temperature,
            first_image=start,
        )
    sets = {
        COMPLETED: completed.cpu().numpy().astype(np.uint16),
        ORIGINAL: originals,
        SHUFFLED: _shuffled(originals, half, evaluation.seed, start),
        OTHER: others,
    }
    return {name: _network_features(evaluation, tokens, network) for name, tokens in sets.items()}


def _shuffled(originals: np.ndarray, half: int, seed: int, start: int) -> np.ndarray:
    """The pictures (B, T) with the colours behind position `half` in random order, each picture its own."""
    shuffled = originals.copy()
    random = generator(seed, "shuffled lower halves", start)
    shuffled[:, half:] = random.permuted(originals[:, half:], axis=1)
    return shuffled


def _network_features(evaluation: Evaluation, tokens: np.ndarray, network: FeatureNetwork) -> np.ndarray:
    """float32 (B, F) of tokens (B, T)."""
    pictures = decode(tokens, evaluation.shards.palette, evaluation.shards.resolution)  # (B, H, W, 3)
    channels_first = torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)))
    return network.features(channels_first.to(evaluation.accelerator.device)).cpu().numpy()
