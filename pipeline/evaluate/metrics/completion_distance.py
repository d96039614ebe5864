"""The Fréchet distance of completed images to real images, with a lower and an upper reference.

A split is divided into two random halves. Images of the first half are completed, one sample each, and compared with as
many images of the second half. Two references are measured against the same images of the second half. The floor is the
originals of the completions. The ceiling is the originals with the pixels of their lower halves in random order, which
have the right colors but no structure.
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

    If the split has fewer than twice `distance_images` images, half of it is completed. Keys: `network`, `images`, and
    the squared distances to the second half: `completions`, `originals` (the floor), `shuffled_lower_halves` (the
    ceiling). `completions_to_their_originals` is the distance to the images that were completed.
    """
    images, split = compared(evaluation, options), evaluation.shards.split(options.split)
    chosen = generator(evaluation.seed, "completion distance", options.split).permutation(split.images)
    file, device = options.feature_network, evaluation.accelerator.device
    network = feature_network(None if file is None else Path(file), device)

    def features(part: slice) -> dict[str, np.ndarray]:
        """The features of the four sets of images, float32 (B, F) each."""
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
    """The number of images to compare. Raises ValueError if the split has too few."""
    split = evaluation.shards.split(options.split)
    images = min(options.distance_images, split.images // 2)
    if images < FEWEST:
        raise ValueError(
            f"{evaluation.shards.path} has {split.images} images in its split {options.split}, too few for a "
            f"distance; set completions.distance_images to 0."
        )
    return images


def _image_sets(
    evaluation: Evaluation, originals: np.ndarray, others: np.ndarray, temperature: float, start: int
) -> dict[str, np.ndarray]:
    """The four sets of images, uint16 (B, T) each; start: the number of the first image among all."""
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
    """The images (B, T) with the tokens from position `half` on in random order, a different one for each image."""
    shuffled = originals.copy()
    random = generator(seed, "shuffled lower halves", start)
    shuffled[:, half:] = random.permuted(originals[:, half:], axis=1)
    return shuffled
