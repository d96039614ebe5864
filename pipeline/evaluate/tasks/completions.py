"""Completions: the model draws the lower halves of images; `python -m pipeline complete` draws only the figure.

The task also measures the Fréchet distance of completions to real images (completion_distance.py). JSON: `split`,
`images` (the numbers of the images shown), `classes`, `samples`, `temperature`, and `distance` as documented in
completion_distance.py, or null.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from data_prep.common.files import atomic_write, file_sha256
from data_prep.common.seeding import generator
from data_prep.shards.reader import ShardSet
from pipeline.distributed import from_first
from pipeline.evaluate.context import Evaluation, split_labels
from pipeline.evaluate.metrics.completion_distance import compared, completion_distance
from pipeline.evaluate.metrics.feature_network import feature_network
from pipeline.evaluate.options import CompletionsOptions, GridOptions
from pipeline.evaluate.task import Task
from pipeline.model.image_grid import completion_grid
from pipeline.model.sampling import complete_halves
from pipeline.model_folder.convert import LoadedModel
from pipeline.results.headline import Headline
from pipeline.results.report.html import figure, note, table

FIGURE = "completions.png"
TITLE_PIXELS = 22
"""Height of the strip of titles above the grid, and of the caption below it."""
GREY = (70, 70, 70)
CANT_COMPLETE = (
    "completions need a model of the next color, but this one was trained with masked_color: it predicts masked pixels "
    "and can't generate; exclude completions."
)


class Completions(Task[CompletionsOptions]):
    """Completed half images, and the Fréchet distance of completions to real images."""

    title = "Completions"

    def unfit(self, evaluation: Evaluation) -> str | None:
        return CANT_COMPLETE if evaluation.masked else None

    def check(self, evaluation: Evaluation, earlier: Collection[str]) -> None:
        """Raises ValueError if the split has too few images, or if the user's network does not accept them."""
        options = self.options
        choose_examples(evaluation.shards, options.split, options.images, evaluation.seed)
        if not options.distance_images:
            return
        compared(evaluation, options)
        if options.feature_network is not None:
            device, side = evaluation.accelerator.device, evaluation.shards.resolution
            network = feature_network(Path(options.feature_network), device)
            network.features(torch.zeros(2, 3, side, side, dtype=torch.uint8, device=device))

    def other_inputs(self, results: Path) -> dict[str, str]:
        """The digest of the user's feature network."""
        file = self.options.feature_network
        return {} if file is None else {"network_sha256": file_sha256(Path(file))}

    def measure(self, evaluation: Evaluation) -> dict[str, Any]:
        """Draws `completions.png` on the first rank; the completions for the distance are divided among the ranks."""
        options = self.options
        evaluation.log(f"completing {options.images} half images, {options.samples} times each")
        path = evaluation.results / FIGURE
        result = from_first(
            lambda: draw_completions(evaluation.model, evaluation.shards, options, evaluation.seed, path)
        )
        distance = completion_distance(evaluation, options) if options.distance_images else None
        return result | {"distance": distance}

    @classmethod
    def summary(cls, result: dict[str, Any]) -> str:
        shown = f"{len(result['images'])} images, {result['samples']} samples each, in {FIGURE}"
        distance = result["distance"]
        if distance is None:
            return shown
        return (
            f"{shown}; Fréchet distance of {distance['images']} completions {distance['completions']:.3f}, of their "
            f"originals {distance['originals']:.3f}, with shuffled lower halves "
            f"{distance['shuffled_lower_halves']:.3f} ({distance['network']})"
        )

    @classmethod
    def headlines(cls, result: dict[str, Any]) -> list[Headline]:
        """The distance, with its two references in the detail."""
        distance = result["distance"]
        if distance is None:
            return []
        bounds = f"floor {distance['originals']:.3f}, shuffled {distance['shuffled_lower_halves']:.3f}"
        return [Headline("Fréchet distance of completions", distance["completions"], "distance", detail=bounds)]

    @classmethod
    def section(cls, result: dict[str, Any], folder: Path) -> str:
        """The figure and the distances."""
        caption = (
            f"The first column is the half that the model received, the last column the original; between them are "
            f"{result['samples']} samples at temperature {result['temperature']:g}, seed {result['seed']}. The images "
            f"are random images of {result['split']}, of different classes as far as possible; no sample was selected."
        )
        count = len(result["images"])
        alternative = (
            f"Grid of {count} {'row' if count == 1 else 'rows'}, one per image of {result['split']}: the given upper "
            f"half, {result['samples']} completions drawn by the model, the original."
        )
        shown = figure(folder / FIGURE, alternative, caption)
        distance = result["distance"]
        if distance is None:
            return shown
        rows = [
            ["Completions", f"{distance['completions']:.4f}"],
            ["Their originals (floor)", f"{distance['originals']:.4f}"],
            ["Originals with shuffled lower halves (ceiling)", f"{distance['shuffled_lower_halves']:.4f}"],
        ]
        completions, rows = rows[0], sorted(rows, key=lambda row: float(row[1]))
        return (
            shown
            + table(
                ["Fréchet distance to other images of the split", "d² (lower is better)"],
                rows,
                ours=[rows.index(completions)],
            )
            + note(
                f"{distance['images']:,} images, completed once each, against {distance['images']:,} other images of "
                f"{result['split']}; features of {distance['network']}. Distances depend on the number of images and "
                "on the network, so they can't be compared with published FIDs. The distance of the completions to "
                "their own originals, which have the same upper halves, is "
                f"{distance['completions_to_their_originals']:.4f}."
            )
        )


def choose_examples(shards: ShardSet, split_name: str, images: int, seed: int) -> np.ndarray:
    """Numbers of `images` random images of a split, of different classes as far as possible; int64 (images,).

    Raises ValueError if the split is absent or has fewer images.
    """
    split = shards.split(split_name)
    if split.images < images:
        raise ValueError(f"images is {images}, but {shards.path} has {split.images} images in its split {split_name}.")
    labels = split_labels(split)
    shuffled = generator(seed, "examples", split_name).permutation(split.images)
    _, first_of_class = np.unique(labels[shuffled], return_index=True)
    others = np.delete(shuffled, first_of_class)
    return np.concatenate([shuffled[np.sort(first_of_class)], others])[:images]


def draw_completions(
    model: LoadedModel, shards: ShardSet, options: GridOptions, seed: int, path: Path
) -> dict[str, Any]:
    """Writes the grid of completions as a PNG, and returns what the task's JSON records of it."""
    chosen = choose_examples(shards, options.split, options.images, seed)
    tokens, labels = shards.split(options.split).gather(chosen)
    drawn = complete_halves(model.model, tokens, samples=options.samples, seed=seed, temperature=options.temperature)
    columns = ["given half", *(f"sample {number}" for number in range(1, options.samples + 1)), "original"]
    caption = f"{options.split}, seed {seed}, temperature {options.temperature:g}"
    grid = with_titles(completion_grid(tokens, drawn, shards.palette, shards.resolution), columns, caption)
    with atomic_write(path) as temporary:
        Image.fromarray(grid).save(temporary, format="png")
    return {
        "split": options.split,
        "images": chosen.tolist(),
        "classes": [shards.classes[label] if label >= 0 else None for label in labels],
        "samples": options.samples,
        "temperature": options.temperature,
    }


def with_titles(grid: np.ndarray, columns: list[str], caption: str) -> np.ndarray:
    """The grid, uint8 (height, width, 3), with a title above each of its equally wide columns and a caption below."""
    height, width, _ = grid.shape
    page = Image.new("RGB", (width, height + 2 * TITLE_PIXELS), "white")
    page.paste(Image.fromarray(grid), (0, TITLE_PIXELS))
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=TITLE_PIXELS * 0.6)
    for number, title in enumerate(columns):
        center = ((number + 0.5) * width / len(columns), TITLE_PIXELS * 0.6)
        pen.text(center, title, fill=GREY, font=font, anchor="mm")
    pen.text((TITLE_PIXELS * 0.3, height + TITLE_PIXELS * 1.5), caption, fill=GREY, font=font, anchor="lm")
    return np.asarray(page)
