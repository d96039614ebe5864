"""Measures the probe on any layout: features by all ranks together, then one layer a rank.

Data-parallel ranks share the images. Features are computed in micro-batches of the same images on any number of ranks,
and the classifier of a layer is fitted by one rank to the features of all images in one order. So with an equal
batch.micro_size the accuracies are equal on any number of ranks. A rank keeps the features of its own images (fp32, of
the layers that it computes), and of one layer those of all images; Gram matrices of all layers would be larger for the
deep models: 8 (L+1) D^2 bytes instead of 4 N (L+1) D / ranks.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from pipeline.distributed import Attempt, attempt, exchange, gather
from pipeline.model.masks import Batch
from pipeline.probe_images import ProbeImages
from pipeline.train.engine.base import Engine
from pipeline.train.probe.ridge import NO_SCORE, LayerScore, Rows, score_layer
from pipeline.train.setup import Inputs
from pipeline.train.validation import CHUNK_MICRO_BATCHES

logger = logging.getLogger(__name__)

Check = Callable[[], None]


def probe(engine: Engine, inputs: Inputs, check: Check) -> dict[str, Any]:
    """probe_accuracy, probe_layer and probe_accuracy_by_layer of the engine's weights, the same on all ranks.

    check: called on all ranks between batches and between layers; what it raises ends the probe. The layer is the best
    on the images of choice; the accuracies are those on the images of test. NaN where features are NaN or Inf.
    """
    scores = score_layers(engine, own_features(engine, inputs, check), inputs, check)
    best = max(scores, key=lambda layer: (-1.0 if np.isnan(scores[layer].choice) else scores[layer].choice, -layer))
    by_layer = [scores[layer].test for layer in sorted(scores)]
    return {"probe_accuracy": scores[best].test, "probe_layer": best, "probe_accuracy_by_layer": by_layer}


def images_of(inputs: Inputs) -> ProbeImages:
    """The labelled images of a run that has a probe."""
    assert inputs.probe is not None
    return inputs.probe


def own_features(engine: Engine, inputs: Inputs, check: Check) -> dict[int, np.ndarray]:
    """Pooled features, float32 (n, D) by layer: of this data-parallel rank's images, of the layers that it computes.

    The images are divided into equal shares of complete micro-batches; the last one is repeated to fill them. A masked
    model sees all pixels.
    """
    config, images = inputs.config, images_of(inputs)
    micro = config.batch.micro_size
    share = -(-len(images) // (micro * engine.data_ranks)) * micro
    numbers = np.minimum(engine.data_rank * share + np.arange(share), len(images) - 1)
    chunk = CHUNK_MICRO_BATCHES * config.parallel.pipeline_stages * micro
    features: dict[int, np.ndarray] = {}
    for start in range(0, share, chunk):
        check()
        tokens = images.tokens(numbers[start : start + chunk])
        masked = np.zeros(tokens.shape, bool) if config.objective.kind == "masked_color" else None
        for layer, rows in engine.features(Batch(tokens, masked)).items():
            if layer not in features:
                features[layer] = np.empty((share, rows.shape[1]), np.float32)
            features[layer][start : start + len(rows)] = rows
    return features


def score_layers(
    engine: Engine, features: dict[int, np.ndarray], inputs: Inputs, check: Check
) -> dict[int, LayerScore]:
    """The score of every layer, on every rank; as many layers at a time as there are ranks."""
    ranks, images = inputs.ranks, images_of(inputs)
    held = gather((engine.data_rank, {layer: rows.shape for layer, rows in features.items()}))
    shapes = {layer: shape for _, of_rank in held for layer, shape in of_rank.items()}
    senders: dict[tuple[int, int], int] = {}  # of (data-parallel rank, layer): its first rank that computes the layer
    for rank, (data_rank, of_rank) in enumerate(held):
        for layer in of_rank:
            senders.setdefault((data_rank, layer), rank)
    scores: dict[int, LayerScore] = {}
    for first in range(0, len(shapes), ranks.count):
        check()
        layers = sorted(shapes)[first : first + ranks.count]  # rank r fits that of number r
        own = layers[ranks.rank] if ranks.rank < len(layers) else None
        sent = [features[layer] if senders[engine.data_rank, layer] == ranks.rank else None for layer in layers]
        expected = {} if own is None else {rank: shapes[own] for (_, of), rank in senders.items() if of == own}
        shares = exchange(sent, expected)
        tried: Attempt[LayerScore] = Attempt()
        if own is not None:
            in_order = [shares[senders[data_rank, own]] for data_rank in range(engine.data_ranks)]
            tried = attempt(partial(_score, in_order, images, ranks.device))
        found = gather((tried.result, tried.error is not None))
        tried.value(any(failed for _, failed in found))  # an error of one rank ends the probe on all
        scores |= dict(zip(layers, (score or NO_SCORE for score, _ in found[: len(layers)]), strict=True))
    return scores


def _score(shares: list[np.ndarray], images: ProbeImages, device: torch.device) -> LayerScore:
    """The score of a layer by each data-parallel rank's share of its features, float32 (n, D); together all images'.

    Computed on the CPU if the device has too little memory or its eigendecomposition fails; NO_SCORE, which is logged,
    if the CPU fails too: a probe must not end a run.
    """
    parts = images.train, images.choice, images.test
    features = np.concatenate(shares)[: len(images)]
    of_parts = np.split(features, np.cumsum(list(map(len, parts)))[:-1])
    train, choice, test = (Rows(rows, part.labels) for rows, part in zip(of_parts, parts, strict=True))
    for where in (device, torch.device("cpu")):
        try:
            return score_layer(train, choice, test, where)
        except (torch.OutOfMemoryError, MemoryError, torch.linalg.LinAlgError) as error:
            failure = f"the classifier of a layer could not be fitted on {where} ({type(error).__name__}: {error})"
            logger.warning(" ".join(failure.split()))
    return NO_SCORE
