import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.palette.codec import decode
from data_prep.preview import CELL, COLUMNS, GAP, SWATCH, TEXT, draw_result
from data_prep.shards.reader import open_shard_set


def cell(grid: np.ndarray, index: int, column: int, columns: int) -> np.ndarray:
    """Image `index`, drawn in one of `columns` columns, back at 8x8."""
    left = GAP + index % COLUMNS * (columns * CELL + GAP) + column * CELL
    top = GAP + index // COLUMNS * (CELL + TEXT + GAP)
    return grid[top : top + CELL, left : left + CELL][CELL // 16 :: CELL // 8, CELL // 16 :: CELL // 8]


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_stored_image_is_next_to_its_source(split: str, shards: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    assert run("show", shards, "--split", split, "--images", 10, "--out", tmp_path / "grid.png").code == 0
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    shard_set = open_shard_set(shards)
    stored = decode(shard_set.split(split).gather(np.arange(10))[0], shard_set.palette, 8)
    colors = 127.5 * (shard_set.palette.astype(float) + 1)
    for index in range(10):
        assert (cell(grid, index, 1, 2) == stored[index]).all()
        source = cell(grid, index, 0, 2).astype(float)
        nearest = ((source[:, :, None] - colors) ** 2).sum(-1).argmin(-1)
        assert (np.rint(colors[nearest]) == stored[index]).all()


def test_without_the_source_the_stored_images_are_shown(
    shards: Path, folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    shutil.rmtree(folder)
    result = run("show", shards, "--images", 3, "--out", tmp_path / "grid.png")
    assert result.code == 0
    assert "without the source images" in result.err
    assert Image.open(tmp_path / "grid.png").width == 3 * (CELL + GAP) + GAP


def strip(grid: np.ndarray, images: int, colors: int) -> np.ndarray:
    """The colors below the images, in reading order: uint8 (colors, 3)."""
    top = GAP + -(-images // COLUMNS) * (CELL + TEXT + GAP)
    across = (grid.shape[1] - 2 * GAP) // SWATCH
    part = grid[top : len(grid) - GAP, GAP : GAP + across * SWATCH]
    assert part.shape[0] == -(-colors // across) * SWATCH
    for row in range(SWATCH):  # a color fills its square
        assert (part[row::SWATCH, row::SWATCH] == part[::SWATCH, ::SWATCH]).all()
    assert (part[::SWATCH, ::SWATCH].reshape(-1, 3)[colors:] == 255).all()
    return part[::SWATCH, ::SWATCH].reshape(-1, 3)[:colors]


@pytest.mark.parametrize(("images", "colors"), [(1, 512), (3, 16), (9, 512), (24, 700)])
def test_the_palette_is_at_the_bottom_from_dark_to_bright(images: int, colors: int, tmp_path: Path) -> None:
    random = np.random.default_rng(images)
    palette = random.uniform(-1, 1, (colors, 3)).astype(np.float32)
    views = random.integers(0, 256, (images, 8, 8, 3), dtype=np.uint8)
    tokens = random.integers(0, colors, (images, 64)).astype(np.uint16)
    labels = np.where(np.arange(images) % 2, 0, -1).astype(np.int32)
    draw_result(views, tokens, labels, ["one"], palette, tmp_path / "pictures.png")
    grid = np.asarray(Image.open(tmp_path / "pictures.png"))
    expected = np.rint(127.5 * (palette.astype(float) + 1)).astype(np.uint8)
    drawn = strip(grid, images, colors)
    assert sorted(map(tuple, drawn.tolist())) == sorted(map(tuple, expected.tolist()))
    assert (np.diff(np.asarray(drawn, float) @ [0.299, 0.587, 0.114]) >= 0).all()
    for index in range(images):
        assert (cell(grid, index, 0, 2) == views[index]).all()
        assert (cell(grid, index, 1, 2) == expected[tokens[index]].reshape(8, 8, 3)).all()


def test_a_preparation_writes_a_preview(shards: Path) -> None:
    grid = np.asarray(Image.open(shards / "pictures.png"))
    shard_set = open_shard_set(shards)
    stored = decode(shard_set.split("train").gather(np.arange(24))[0], shard_set.palette, 8)
    assert all((cell(grid, index, 1, 2) == stored[index]).all() for index in range(24))
    assert len(strip(grid, 24, 16)) == 16


def test_the_names_of_classes_are_below_the_images(tmp_path: Path) -> None:
    palette = np.zeros((2, 3), np.float32)
    labels = np.array([0, -1], np.int32)
    draw_result(None, np.zeros((2, 64), np.uint16), labels, ["abbey"], palette, tmp_path / "pictures.png")
    grid = np.asarray(Image.open(tmp_path / "pictures.png"))
    named, unlabelled = (
        grid[GAP + CELL : GAP + CELL + TEXT, GAP + index * (CELL + GAP) :][:, :CELL] for index in range(2)
    )
    assert (named < 128).any()
    assert (unlabelled == 255).all()


def test_skipped_images_are_not_shown(
    shards: Path, folder: Path, options: list[str], tmp_path: Path, run: Callable[..., Any]
) -> None:
    """Each stored image is next to its own source image, even if images before it were skipped."""
    for file in sorted((folder / "train").glob("*/*.png"))[::3]:
        file.write_bytes(file.read_bytes()[:100])
    out = tmp_path / "skipped"
    assert run("shards", *options, "--max_skipped", 1, "--out", out).code == 0
    assert open_shard_set(out).manifest["skipped"]
    test_stored_image_is_next_to_its_source("train", out, tmp_path, run)


def test_images_damaged_since_are_not_shown(
    shards: Path, folder: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    for file in (folder / "train").glob("*/*.png"):
        file.write_bytes(b"")
    result = run("show", shards, "--images", 3, "--out", tmp_path / "grid.png")
    assert result.code == 0
    assert "can no longer be read" in result.err
