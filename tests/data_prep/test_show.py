import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.palette import decode
from data_prep.shards import open_shard_set
from data_prep.show import CELL, COLUMNS, GAP, TEXT


def cell(grid: np.ndarray, index: int, column: int, columns: int) -> np.ndarray:
    """Image `index`, drawn in one of `columns` columns, back at 8x8."""
    left = GAP + index % COLUMNS * (columns * CELL + GAP) + column * CELL
    top = GAP + index // COLUMNS * (CELL + TEXT + GAP)
    return grid[top : top + CELL, left : left + CELL][CELL // 16 :: CELL // 8, CELL // 16 :: CELL // 8]


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_stored_image_stands_beside_its_source(
    split: str, shards: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
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
    assert "without the source's pictures" in result.out
    assert Image.open(tmp_path / "grid.png").width == 3 * (CELL + GAP) + GAP
