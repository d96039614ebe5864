"""A labelled grid of a shard set's images, beside the pictures they were made from."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data_prep.config import DataConfig
from data_prep.files import written_aside
from data_prep.palette import decode
from data_prep.plan import make_plan
from data_prep.shards import ShardSet, open_shard_set
from data_prep.sources import open_source

COLUMNS = 8
CELL = 96
"""Pixels a side of a drawn image."""
TEXT = 14
GAP = 6


def draw(path: Path | str, split: str, images: int, out: Path) -> None:
    """Writes the first images of a split as PNG: each pair is the source's view and the stored image."""
    if images < 1:
        raise ValueError(f"--images is {images}; it must be at least 1.")
    shard_set = open_shard_set(path)
    stored = shard_set.split(split)
    numbers = np.arange(min(images, stored.images))
    tokens, labels = stored.gather(numbers)
    rows = [decode(tokens, shard_set.palette, shard_set.resolution)]
    original, note = _originals(shard_set, split, len(numbers))
    if original is not None:
        rows.insert(0, original)
    names = [shard_set.classes[label] if label >= 0 else "" for label in labels]
    grid = draw_grid(rows, names)
    with written_aside(out) as aside, aside.open("wb") as file:
        grid.save(file, "PNG")
    print(f"{out}: {len(numbers)} images of {split}, {note}")


def _originals(shard_set: ShardSet, split: str, count: int) -> tuple[np.ndarray | None, str]:
    """The views that the first images of a split were made from, uint8 (N, R, R, 3), and what to say of them."""
    manifest = shard_set.manifest
    config = DataConfig.from_dict(manifest["config"])
    try:
        source = open_source(config.source)
    except (ValueError, OSError) as error:
        return None, f"without the source's pictures, as it can't be opened: {error}"
    if source.streams:
        return None, "without the source's pictures, as the source is a stream."
    if source.fingerprint != manifest["source"]["fingerprint"]:
        return None, "without the source's pictures, as the source has other pictures now."
    plan = make_plan(source, config)
    chosen = plan.splits[split]
    views = plan.views(chosen.source_split)
    places = zip(chosen.pictures[:count], chosen.views[:count], strict=True)
    return np.stack(
        [views.view(int(index), int(number)) for index, number in places]
    ), "left the source's view, right as stored."


def draw_result(
    views: np.ndarray, tokens: np.ndarray, labels: np.ndarray, classes: list[str], palette: np.ndarray, out: Path
) -> None:
    """Writes a PNG of views uint8 (N, R, R, 3) beside their tokens (N, T) drawn in the palette's colours."""
    names = [classes[label] if label >= 0 else "" for label in labels]
    grid = draw_grid([views, decode(tokens, palette, views.shape[1])], names)
    with written_aside(out) as aside, aside.open("wb") as file:
        grid.save(file, "PNG")


def draw_grid(columns: list[np.ndarray], names: list[str]) -> Image.Image:
    """Draws image i of each of `columns`, uint8 (N, R, R, 3), side by side, with names[i] below."""
    count = len(names)
    across = min(COLUMNS, count)
    width, height = len(columns) * CELL + GAP, CELL + TEXT + GAP
    canvas = Image.new("RGB", (across * width + GAP, -(-count // across) * height + GAP), "white")
    pen = ImageDraw.Draw(canvas)
    for index, name in enumerate(names):
        left, top = GAP + index % across * width, GAP + index // across * height
        for place, pictures in enumerate(columns):
            cell = Image.fromarray(pictures[index]).resize((CELL, CELL), Image.Resampling.NEAREST)
            canvas.paste(cell, (left + place * CELL, top))
        pen.text((left, top + CELL + 1), name[: width // 6], fill="black")
    return canvas
