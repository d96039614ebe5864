"""Density: how many nats and bits per colour a model needs for a split, beside models of counts.

Baselines, from weak to strong; their counts come from the whole train split:

    uniform        each of the V colours alike: ln V
    unigram        how often a colour occurs
    bigram         given the colour to the left (in raster order)
    left x above   p(c | left) p(c | above) / p(c), normalised: what two neighbours tell if independent given c
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.shards import Split
from pipeline.evaluate.inputs import Evaluation, Pictures, from_first

PICTURES_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class Options:
    """Nats and bits per colour."""

    split: str = "test"
    """The split to score."""


def measure(evaluation: Evaluation, options: Options) -> dict[str, Any]:
    """Mean loss of the model and of the baselines on one split; each picture weighs the same."""
    pictures = evaluation.pictures(options.split)
    losses = picture_losses(evaluation, pictures)  # (N,)
    nats = float(losses.mean())
    baselines = from_first(evaluation.accelerator, lambda: baseline_losses(evaluation, pictures))
    return {
        "split": options.split,
        "images": len(pictures),
        "nats_per_color": nats,
        "bits_per_color": nats / math.log(2),
        "nats_standard_error": float(losses.std() / math.sqrt(len(losses))),
        **{f"{name}_nats_per_color": loss for name, loss in baselines.items()},
    }


def summary(result: dict[str, Any]) -> str:
    """The result in a line."""
    return (
        f"{result['nats_per_color']:.4f} nats, {result['bits_per_color']:.4f} bits per colour on {result['split']}; "
        f"uniform {result['uniform_nats_per_color']:.4f}, colour frequencies {result['unigram_nats_per_color']:.4f}, "
        f"previous colour {result['bigram_nats_per_color']:.4f}, "
        f"left x above {result['left_times_above_nats_per_color']:.4f}"
    )


def picture_losses(evaluation: Evaluation, pictures: Pictures) -> np.ndarray:
    """Mean nats per colour of each picture, float64 (N,), the same on every rank."""
    import torch
    from accelerate.utils import gather_object

    from pipeline.model.objectives import next_color, per_token_loss

    model, colors = evaluation.model.model, evaluation.model.config.colors
    mine = []
    with torch.inference_mode(), evaluation.accelerator.autocast():
        for place, tokens in evaluation.batches(pictures, f"loss on {pictures.split.name}"):
            inputs, targets = next_color(tokens, colors)  # (B, T)
            nats = per_token_loss(model(inputs).logits, targets, colors)  # (B, T)
            mine.append((place, nats.double().mean(dim=1).cpu().numpy()))
    losses = np.full(len(pictures), np.nan)
    for place, values in gather_object(mine):
        losses[place] = values
    return losses


def baseline_losses(evaluation: Evaluation, pictures: Pictures) -> dict[str, float]:
    """Mean nats per colour of the baselines on `pictures`, counts taken from the whole train split."""
    colors, side = evaluation.shards.colors, evaluation.shards.resolution
    counts = Counts.of(evaluation.shards.split("train"), colors, side)
    totals = {"uniform": 0.0, "unigram": 0.0, "bigram": 0.0, "left_times_above": 0.0}
    for start in range(0, len(pictures), PICTURES_AT_ONCE):
        tokens = pictures.tokens(start, start + PICTURES_AT_ONCE).astype(np.int64)  # (n, T)
        for name, log_probability in counts.log_probabilities(tokens, side).items():
            totals[name] -= float(log_probability.sum())
    return {name: total / (len(pictures) * side * side) for name, total in totals.items()}


@dataclass(frozen=True)
class Counts:
    """What the baselines know of the training pictures, as smoothed log probabilities."""

    single: np.ndarray  # (V,) ln p(c)
    left: np.ndarray  # (V, V) ln p(c | colour to the left in raster order), rows the condition
    above: np.ndarray  # (V, V) ln p(c | colour above)

    @classmethod
    def of(cls, split: Split, colors: int, side: int) -> "Counts":
        """Counts a whole split of pictures of side x side colours."""
        single = np.zeros(colors, np.int64)
        left, above = np.zeros((2, colors, colors), np.int64)
        for tokens in _records(split):
            single += np.bincount(tokens.ravel(), minlength=colors)
            left += _pairs(tokens[:, :-1], tokens[:, 1:], colors)
            above += _pairs(tokens[:, :-side], tokens[:, side:], colors)
        probability = (single + 1) / (single.sum() + colors)  # add one: no colour is impossible
        return cls(
            np.log(probability),
            np.log(_witten_bell(left, probability)),
            np.log(_witten_bell(above, probability)),
        )

    def log_probabilities(self, tokens: np.ndarray, side: int) -> dict[str, np.ndarray]:
        """ln p of every colour of int64 (n, T), by baseline; where a neighbour is missing, by what is there."""
        uniform = np.full(tokens.shape, -math.log(len(self.single)))
        unigram = self.single[tokens]
        bigram = unigram.copy()
        bigram[:, 1:] = self.left[tokens[:, :-1], tokens[:, 1:]]
        return {
            "uniform": uniform,
            "unigram": unigram,
            "bigram": bigram,
            "left_times_above": self._left_times_above(tokens.reshape(-1, side, side)).reshape(tokens.shape),
        }

    def _left_times_above(self, grid: np.ndarray) -> np.ndarray:  # (n, H, W)
        # The normaliser depends on the two neighbours alone: a table (left, above), one matrix product.
        normaliser = np.log((np.exp(self.left - self.single)) @ np.exp(self.above).T)
        result = self.single[grid]
        result[:, 0, 1:] = self.left[grid[:, 0, :-1], grid[:, 0, 1:]]
        result[:, 1:, 0] = self.above[grid[:, :-1, 0], grid[:, 1:, 0]]
        here, left, above = grid[:, 1:, 1:], grid[:, 1:, :-1], grid[:, :-1, 1:]
        result[:, 1:, 1:] = (
            self.left[left, here] + self.above[above, here] - self.single[here] - normaliser[left, above]
        )
        return result


def _records(split: Split) -> Iterator[np.ndarray]:
    for record in range(len(split.record_images)):
        yield np.asarray(split.record(record)[0], np.int64)  # (n, T)


def _pairs(condition: np.ndarray, outcome: np.ndarray, colors: int) -> np.ndarray:
    """How often each outcome follows each condition: int64 (V, V)."""
    return np.bincount((condition * colors + outcome).ravel(), minlength=colors * colors).reshape(colors, colors)


def _witten_bell(pairs: np.ndarray, fallback: np.ndarray) -> np.ndarray:
    """p(outcome | condition) (V, V): counts (V, V) mixed with `fallback` (V,).

    Witten-Bell smoothing: a condition followed by k kinds of outcome in n places gives weight k / (n + k)
    to the fallback; one never seen gives it all.
    """
    seen = pairs.sum(axis=1, keepdims=True)
    kinds = (pairs > 0).sum(axis=1, keepdims=True)
    kinds[seen == 0] = 1
    return (pairs + kinds * fallback) / (seen + kinds)
