"""How far completed images are from true ones: the Fréchet distance, with what bounds it from both sides.

A split is halved at random. Images of the first half are completed, one sample each, and compared with as many of the
other half. From the same other half are measured: the originals that were completed, which no completion can beat but
by chance, and the originals with the colors of their lower halves in random order: the right colors, and no order.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.common.seeding import generator
from data_prep.palette.codec import decode
from pipeline.evaluate.context import Evaluation
from pipeline.evaluate.metrics.feature_network import feature_network
from pipeline.evaluate.metrics.frechet import Gaussian, frechet_distance
from pipeline.evaluate.options import CompletionsOptions
from pipeline.evaluate.work_sharing import map_parts
from pipeline.model.sampling import complete

FEWEST = 2


def completion_distance(evaluation: Evaluation, options: CompletionsOptions) -> dict[str, Any]:
    """The distances, the same on every rank. Raises ValueError if the split has too few images.

    Half the split is completed if it has not twice as many as `distance_images`. Keys: `network`, `images`, and squared
    distances to the other half: `completions`, `originals` (the floor), `shuffled_lower_halves` (the ceiling);
    `completions_to_their_originals` compares with the very images that were completed.
    """
    images, split = compared(evaluation, options), evaluation.shards.split(options.split)
    chosen = generator(evaluation.seed, "completion distance", options.split).permutation(split.images)
    file, device = options.feature_network, evaluation.accelerator.device
    network = feature_network(None if file is None else Path(file), device)

    def features(part: slice) -> dict[str, np.ndarray]:
        """Of the four sets, float32 (B, F) each."""
        originals, others = (split.gather(half[part])[0] for half in (chosen[:images], chosen[images:]))
        sets = _image_sets(evaluation, originals, others, options.temperature, part.start)
        found = {}
        for name, tokens in sets.items():
            pixels = decode(tokens, evaluation.shards.palette, evaluation.shards.resolution)  # (B, H, W, 3)
            channels_first = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
            found[name] = network.features(channels_first.to(device)).cpu().numpy()
        return found

    size = evaluation.sizes.batch_size
    parts = map_parts(evaluation, "completions compared", "distance-{}", images, size, features)
    gaussians = {name: Gaussian.of(np.concatenate([part[name] for part in parts])) for name in parts[0]}
    return {
        "network": network.name,
        "images": images,
        "completions": frechet_distance(gaussians["completed"], gaussians["other"]),
        "originals": frechet_distance(gaussians["original"], gaussians["other"]),
        "shuffled_lower_halves": frechet_distance(gaussians["shuffled"], gaussians["other"]),
        "completions_to_their_originals": frechet_distance(gaussians["completed"], gaussians["original"]),
    }


def compared(evaluation: Evaluation, options: CompletionsOptions) -> int:
    """How many images are compared. Raises ValueError if the split has too few."""
    split = evaluation.shards.split(options.split)
    images = min(options.distance_images, split.images // 2)
    if images < FEWEST:
        raise ValueError(
            f"{evaluation.shards.path} has {split.images} images in its split {options.split}, too few for a "
            f"distance; set completions.distance_images 0."
        )
    return images


def _image_sets(
    evaluation: Evaluation, originals: np.ndarray, others: np.ndarray, temperature: float, start: int
) -> dict[str, np.ndarray]:
    """The sets that are compared, uint16 (B, T) each; start: the number of the first image among all."""
    positions = originals.shape[1]
    prefix = evaluation.on_device(originals[:, : positions // 2])
    with evaluation.accelerator.autocast():
        model, seed = evaluation.model.model, evaluation.seed
        completed = complete(model, prefix, positions, seed=seed, temperature=temperature, first_image=start)
    return {
        "completed": completed.cpu().numpy().astype(np.uint16),
        "original": originals,
        "shuffled": _shuffled(originals, positions // 2, seed, start),
        "other": others,
    }


def _shuffled(originals: np.ndarray, half: int, seed: int, start: int) -> np.ndarray:
    """The images (B, T) with the colors behind position `half` in random order, each image its own."""
    shuffled = originals.copy()
    random = generator(seed, "shuffled lower halves", start)
    shuffled[:, half:] = random.permuted(originals[:, half:], axis=1)
    return shuffled
