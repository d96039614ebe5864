"""Density: the model's loss on a split in nats and bits per color, by position, with count-based baselines.

A masked model predicts only masked pixels, given all others. Its loss is not a density of the image and can be compared
only with the loss of other masked models. Each draw masks other pixels; every image has the same weight.

JSON: `split`, `images`, `masked`, `draws`, `nats_per_color`, `bits_per_color`, `nats_standard_error` (over images; None
for one), `nats_by_position` (H lists of W numbers, rows from the top), for a masked model `nats_by_draw`, and
`<baseline>_nats_per_color`. Baselines from weak to strong, whose counts come from the entire train split:

    uniform        all V colors equally likely: ln V
    unigram        the frequency of a color
    bigram         given the color to the left (in raster order)
    left x above   p(c | left) p(c | above) / p(c), normalized: the two neighbors, taken as independent given c
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.ticker import MaxNLocator

from data_prep.shards.reader import Split
from pipeline.distributed import from_first
from pipeline.evaluate.context import Evaluation, ImageSubset
from pipeline.evaluate.options import DensityOptions
from pipeline.evaluate.task import Task
from pipeline.evaluate.work_sharing import map_parts
from pipeline.model.objectives import IGNORED, per_token_loss
from pipeline.results.figures import draw_or_log, new_figure, save_figure
from pipeline.results.headline import Headline
from pipeline.results.published import NATS
from pipeline.results.report.html import figure, note, table
from pipeline.results.text import image_count, number

FIGURE = "density.png"
IMAGES_AT_ONCE = 4096
NAMES = {
    "model": "This model",
    "uniform": "Uniform",
    "unigram": "Color frequencies",
    "bigram": "Given the previous color (bigram)",
    "left_times_above": "Given the colors to the left and above (product)",
}
BASELINES = ("uniform", "unigram", "bigram", "left_times_above")
BATCHES_PER_ITEM = 32
"""After a kill, a rank recomputes at most this many batches."""

Sums = dict[str, np.ndarray]
"""Of some images, float64: `losses` (n,), the mean nats of each; `sums` and `counts` (T,), the nats and the number
of targets at each position."""


class Density(Task[DensityOptions]):
    """The model's loss, in nats and bits per color."""

    title = "Density"

    def check(self, evaluation: Evaluation, earlier: Collection[str]) -> None:
        """Raises ValueError if the split to score is absent, or train, from which the baselines' counts come."""
        for name in (self.options.split, "train"):
            evaluation.images(name)

    def measure(self, evaluation: Evaluation) -> dict[str, Any]:
        """Measures the mean loss of the model and of the baselines, and draws a heat map of the loss by position.

        Raises ValueError if a loss is NaN or Inf.
        """
        images = evaluation.images(self.options.split)
        draws = self.options.draws if evaluation.masked else 1
        scored = [score(evaluation, images, draw) for draw in range(draws)]
        losses = np.mean([of_draw["losses"] for of_draw in scored], axis=0)  # (N,)
        if lost := int((~np.isfinite(losses)).sum()):
            raise ValueError(
                f"density: the model's loss is NaN or Inf for {lost:,} of {len(losses):,} images of "
                f"{self.options.split}; evaluate another checkpoint, or in fp32 if --precision is bf16."
            )
        nats, side = float(losses.mean()), evaluation.shards.resolution
        error = float(losses.std(ddof=1) / math.sqrt(len(losses))) if len(losses) > 1 else None
        result = {
            "split": self.options.split,
            "images": len(images),
            "masked": evaluation.masked,
            "draws": draws,
            "nats_per_color": nats,
            "bits_per_color": nats / math.log(2),
            "nats_standard_error": error,
            "nats_by_position": nats_by_position(scored, side),
        }
        if evaluation.masked:
            result["nats_by_draw"] = [float(of_draw["losses"].mean()) for of_draw in scored]
        baselines = from_first(
            lambda: evaluation.cache.get_or_compute("baselines", lambda: baseline_losses(evaluation, images))
        )
        result |= {f"{name}_nats_per_color": loss for name, loss in baselines.items()}
        from_first(lambda: draw_or_log(draw_heat_map, result, evaluation.results / FIGURE))
        return result

    @classmethod
    def summary(cls, result: dict[str, Any]) -> str:
        what = "masked pixel" if result["masked"] else "color"
        return (
            f"{result['nats_per_color']:.4f} nats, {result['bits_per_color']:.4f} bits per {what} on "
            f"{image_count(result['images'])} of {result['split']}; uniform {result['uniform_nats_per_color']:.4f}, "
            f"color frequencies {result['unigram_nats_per_color']:.4f}, previous color "
            f"{result['bigram_nats_per_color']:.4f}, left x above {result['left_times_above_nats_per_color']:.4f}"
        )

    @classmethod
    def headlines(cls, result: dict[str, Any]) -> list[Headline]:
        """Nats, which the paper reports too."""
        nats = result["nats_per_color"]
        if result["masked"]:
            return [Headline("Nats per masked pixel", nats, "nats", detail=f"{result['draws']} masks per image")]
        measure = NATS if result["split"] == "test" else ""
        return [Headline("Nats per color", nats, "nats", detail=result["split"], measure=measure)]

    @classmethod
    def section(cls, result: dict[str, Any], folder: Path) -> str:
        """A table of the model and the baselines, and the heat map."""
        result = {key: math.nan if value is None else value for key, value in result.items()}  # as JSON has NaN
        what = "masked pixel" if result["masked"] else "color"
        nats = {"model": result["nats_per_color"]} | {key: result[f"{key}_nats_per_color"] for key in BASELINES}
        rows = sorted([(NAMES[key], value) for key, value in nats.items()], key=lambda row: row[1])
        shown = table(
            ["Predictor (lower is better)", f"nats per {what}", f"bits per {what}"],
            [[name, f"{value:.4f}", f"{value / math.log(2):.4f}"] for name, value in rows],
            ours=[place for place, (name, _) in enumerate(rows) if name == NAMES["model"]],
        )
        masks = f", each under {result['draws']} masks" if result["masked"] else ""
        error, images = result["nats_standard_error"], result["images"]
        spread = f", standard error {error:.4f} nats" if math.isfinite(error) and images > 1 else ""
        explained = note(
            f"Mean over {image_count(images)} of {result['split']}{masks}{spread}. The "
            "baselines' counts come from the entire train split."
            + (
                " A masked model sees all other pixels, so its nats can't be compared with the baselines."
                if masks
                else ""
            )
        )
        causal = "the first pixels of the image and of each row have the fewest pixels before and above them."
        why = "a masked pixel at the border has fewer neighbors." if masks else causal
        heat = np.asarray(result["nats_by_position"], float)
        alternative = (
            f"Heat map of the mean nats at the {heat.shape[0]} by {heat.shape[1]} positions of the image: "
            f"{number(float(heat[0, 0]))} at the first pixel, {number(float(np.nanmedian(heat)))} in the median."
        )
        return shown + explained + figure(folder / FIGURE, alternative, f"Mean nats at each position: {why}")


def score(evaluation: Evaluation, images: ImageSubset, draw: int) -> Sums:
    """The losses of all images under one draw of masks, the same on every rank.

    The work items and the order of summation are the same on any number of ranks.
    """
    size = evaluation.sizes.batch_size * BATCHES_PER_ITEM
    label = f"loss on {images.split.name}" + (f", draw {draw + 1}" if evaluation.masked else "")
    work = partial(_score_some, evaluation, images, draw)
    parts = map_parts(evaluation, label, f"draw-{draw}-{{}}", len(images), size, work)
    return {
        "losses": np.concatenate([part["losses"] for part in parts]),
        "sums": np.sum([part["sums"] for part in parts], axis=0),
        "counts": np.sum([part["counts"] for part in parts], axis=0),
    }


def _score_some(evaluation: Evaluation, images: ImageSubset, draw: int, part: slice) -> Sums:
    """The losses of a part of the images, computed batch by batch."""
    model, colors = evaluation.model.model, evaluation.model.config.colors
    losses, (sums, counts) = [], np.zeros((2, evaluation.shards.resolution**2))
    for rows, tokens in evaluation.batches_of(images, part):
        inputs, targets = evaluation.inputs_and_targets(tokens, images.indices[rows], draw)  # (B, T)
        with torch.inference_mode(), evaluation.accelerator.autocast():
            nats = per_token_loss(model(inputs).logits, targets, colors).double().cpu().numpy()  # (B, T)
        is_target = (targets != IGNORED).cpu().numpy()  # (B, T)
        losses.append(nats.sum(axis=1) / is_target.sum(axis=1))
        sums += nats.sum(axis=0)
        counts += is_target.sum(axis=0)
    return {"losses": np.concatenate(losses), "sums": sums, "counts": counts}


def nats_by_position(scored: list[Sums], side: int) -> list[list[float | None]]:
    """Mean nats at each position over images and draws, H lists of W; None where no pixel was ever masked."""
    sums, counts = (np.sum([part[name] for part in scored], axis=0) for name in ("sums", "counts"))  # (T,)
    means = [float(nats / count) if count else None for nats, count in zip(sums, counts, strict=True)]
    return [means[start : start + side] for start in range(0, side * side, side)]


def draw_heat_map(result: dict[str, Any], path: Path) -> None:
    """Draws the mean nats at each position of the image as a heat map."""
    figure, axes = new_figure(4.6, 3.8)
    axes.grid(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    shown = axes.imshow(np.asarray(result["nats_by_position"], float), cmap="viridis", interpolation="nearest")
    figure.colorbar(shown, ax=axes, label="nats per masked pixel" if result["masked"] else "nats per color")
    axes.set(xlabel="column", ylabel="row, from the top")
    save_figure(figure, path)


def baseline_losses(evaluation: Evaluation, images: ImageSubset) -> dict[str, float]:
    """Mean nats per color of the baselines on `images`, with counts from the entire train split."""
    colors, side = evaluation.shards.colors, evaluation.shards.resolution
    counts = Counts.of(evaluation.shards.split("train"), colors, side)
    totals = dict.fromkeys(BASELINES, 0.0)
    for start in range(0, len(images), IMAGES_AT_ONCE):
        tokens = images.tokens(start, start + IMAGES_AT_ONCE).astype(np.int64)  # (n, T)
        for name, log_probability in counts.log_probabilities(tokens, side).items():
            totals[name] -= float(log_probability.sum())
    return {name: total / (len(images) * side * side) for name, total in totals.items()}


@dataclass(frozen=True)
class Counts:
    """Counts of the training images as smoothed log probabilities, on which the baselines are based."""

    single: np.ndarray  # (V,) ln p(c)
    left: np.ndarray  # (V, V) ln p(c | color to the left in raster order), rows the condition
    above: np.ndarray  # (V, V) ln p(c | color above)

    @classmethod
    def of(cls, split: Split, colors: int, side: int) -> "Counts":
        """Counts over all images (side x side pixels) of a split."""
        single = np.zeros(colors, np.int64)
        left, above = np.zeros((2, colors, colors), np.int64)
        for record in range(len(split.record_images)):
            tokens = np.asarray(split.record(record)[0], np.int64)  # (n, T)
            single += np.bincount(tokens.ravel(), minlength=colors)
            left += _pairs(tokens[:, :-1], tokens[:, 1:], colors)
            above += _pairs(tokens[:, :-side], tokens[:, side:], colors)
        probability = (single + 1) / (single.sum() + colors)  # add-one smoothing: no color has probability 0
        pairs = [np.log(_witten_bell(counted, probability)) for counted in (left, above)]
        return cls(np.log(probability), *pairs)

    def log_probabilities(self, tokens: np.ndarray, side: int) -> dict[str, np.ndarray]:
        """ln p of every color of tokens int64 (n, T), by baseline; without a neighbor, of a simpler one."""
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
        # The normalizer depends only on the two neighbors: one matrix product gives it as a table (left, above).
        normalizer = np.log((np.exp(self.left - self.single)) @ np.exp(self.above).T)
        result = self.single[grid]
        result[:, 0, 1:] = self.left[grid[:, 0, :-1], grid[:, 0, 1:]]
        result[:, 1:, 0] = self.above[grid[:, :-1, 0], grid[:, 1:, 0]]
        here, left, above = grid[:, 1:, 1:], grid[:, 1:, :-1], grid[:, :-1, 1:]
        result[:, 1:, 1:] = (
            self.left[left, here] + self.above[above, here] - self.single[here] - normalizer[left, above]
        )
        return result


def _pairs(condition: np.ndarray, outcome: np.ndarray, colors: int) -> np.ndarray:
    """Number of times that each outcome follows each condition: int64 (V, V)."""
    return np.bincount((condition * colors + outcome).ravel(), minlength=colors * colors).reshape(colors, colors)


def _witten_bell(pairs: np.ndarray, fallback: np.ndarray) -> np.ndarray:
    """p(outcome | condition) (V, V): counts (V, V) mixed with `fallback` (V,).

    Witten-Bell smoothing: a condition that occurs n times with k different outcomes gives the fallback the weight
    k / (n + k). For a condition that never occurs, the fallback has weight 1.
    """
    seen = pairs.sum(axis=1, keepdims=True)
    kinds = (pairs > 0).sum(axis=1, keepdims=True)
    kinds[seen == 0] = 1
    return (pairs + kinds * fallback) / (seen + kinds)
