"""A labelled grid of a shard set's images, next to their source images, above the palette."""

import logging
import math
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data_prep.build.plan import make_plan
from data_prep.common.files import atomic_write
from data_prep.config import DataConfig
from data_prep.images.crops import views_of
from data_prep.images.decode import BadImage
from data_prep.palette.codec import decode
from data_prep.shards.reader import ShardSet, open_shard_set
from data_prep.sources.open import open_source

logger = logging.getLogger(__name__)

COLUMNS = 8
CELL = 96
"""Pixels a side of a drawn image."""
TEXT = 14
GAP = 6
SWATCH = 8
"""Pixels a side of a palette color."""
LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of red, green and blue (Rec. 601)."""


def draw(path: Path | str, split: str, images: int, out: Path) -> None:
    """Writes the first images of a split as PNG, in pairs: the view of the source image, and the stored image."""
    if images < 1:
        raise ValueError(f"--images is {images}; it must be at least 1.")
    if out.suffix.lower() != ".png" or out.is_dir():
        raise ValueError(f"--out is {out}; it must be a file name that ends in .png.")
    shard_set = open_shard_set(path)
    stored = shard_set.split(split)
    numbers = np.arange(min(images, stored.images))
    tokens, labels = stored.gather(numbers)
    views, note = _originals(shard_set, split, len(numbers))
    draw_result(views, tokens, labels, shard_set.classes, shard_set.palette, out)
    logger.info(f"{out}: {len(numbers)} images of {split}, {note}")


def _originals(shard_set: ShardSet, split: str, count: int) -> tuple[np.ndarray | None, str]:
    """The source views of the first images of a split, uint8 (N, R, R, 3) or None, and a note for the log."""
    manifest = shard_set.manifest
    config = DataConfig.from_dict(manifest["config"])
    try:
        source = open_source(config.source)
    except (ValueError, OSError) as error:
        return None, f"without the source images: the source can't be opened: {error}"
    if source.streams:
        return None, "without the source images: the source is a stream."
    if source.fingerprint != manifest["source"]["fingerprint"]:
        return None, "without the source images: they have changed since the preparation."
    chosen = make_plan(source, config).splits[split]
    if "excluded" in manifest and chosen.source_split == "train":
        return None, "without the source images: some are excluded as near-duplicates."
    views = views_of(source, config, chosen.source_split)
    found: list[np.ndarray] = []
    for index, number in zip(chosen.source_indices, chosen.views, strict=True):
        if len(found) == count:
            break
        with suppress(BadImage):  # the preparation skipped it too
            found.append(views.view(int(index), int(number)))
    if len(found) < count:
        return None, "without the source images: some of them can no longer be read."
    return np.stack(found), "source image on the left, stored image on the right."


def draw_result(
    views: np.ndarray | None,
    tokens: np.ndarray,
    labels: np.ndarray,
    classes: list[str],
    palette: np.ndarray,
    out: Path,
) -> None:
    """Writes a PNG of views uint8 (N, R, R, 3), if given, next to their tokens (N, R*R) drawn in color.

    The name of the class is below each pair, and the palette float32 (V, 3) at the bottom.
    """
    resolution = math.isqrt(tokens.shape[1])
    columns = [decode(tokens, palette, resolution)]
    if views is not None:
        columns.insert(0, views)
    grid = draw_grid(columns, [classes[label] if label >= 0 else "" for label in labels])
    drawing = _stack(grid, draw_palette(palette, grid.width - 2 * GAP))
    with atomic_write(out) as temporary, temporary.open("wb") as file:
        drawing.save(file, "PNG")


def draw_palette(palette: np.ndarray, width: int) -> Image.Image:
    """The colors of a palette float32 (V, 3), from dark to bright, in rows of squares, at most `width` pixels wide."""
    colors = decode(np.arange(len(palette))[:, None], palette, 1).reshape(-1, 3)
    colors = colors[np.argsort(colors @ np.array(LUMINANCE), kind="stable")]
    across = max(1, width // SWATCH)
    squares = np.full((-(-len(colors) // across) * across, 3), 255, np.uint8)
    squares[: len(colors)] = colors
    rows = squares.reshape(-1, across, 3).repeat(SWATCH, axis=0).repeat(SWATCH, axis=1)
    return Image.fromarray(rows)


def _stack(upper: Image.Image, lower: Image.Image) -> Image.Image:
    """One image above the other, with a margin around the lower."""
    canvas = Image.new("RGB", (upper.width, upper.height + lower.height + GAP), "white")
    canvas.paste(upper, (0, 0))
    canvas.paste(lower, (GAP, upper.height))
    return canvas


def draw_grid(columns: list[np.ndarray], names: list[str]) -> Image.Image:
    """Draws image i of each of `columns`, uint8 (N, R, R, 3), in a row, with names[i] below."""
    count = len(names)
    across = min(COLUMNS, count)
    width, height = len(columns) * CELL + GAP, CELL + TEXT + GAP
    canvas = Image.new("RGB", (across * width + GAP, -(-count // across) * height + GAP), "white")
    pen = ImageDraw.Draw(canvas)
    for index, name in enumerate(names):
        left, top = GAP + index % across * width, GAP + index // across * height
        for position, images in enumerate(columns):
            cell = Image.fromarray(images[index]).resize((CELL, CELL), Image.Resampling.NEAREST)
            canvas.paste(cell, (left + position * CELL, top))
        pen.text((left, top + CELL + 1), name[: width // 6], fill="black")
    return canvas
