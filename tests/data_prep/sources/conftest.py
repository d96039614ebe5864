"""Windows for the miniatures of datasets, and their preparation by the command."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.config import SourceConfig
from data_prep.images.decode import Decoder
from data_prep.sources.open import open_source

CONFIGS = Path(__file__).parents[3] / "configs/data"


@pytest.fixture(scope="session")
def windows() -> list[np.ndarray]:
    """Forty different windows of photographs, of 64 to 256 pixels."""
    images = open_source(SourceConfig(kind="photographs", train_per_class=4)).splits["train"]
    return [np.ascontiguousarray(images.image(index, Decoder())) for index in range(40)]


@pytest.fixture
def prepare(tmp_path: Path, run: Callable[..., Any]) -> Callable[..., Path]:
    """Prepares all images of a source, uncropped, at 8x8 with the command."""

    def prepared(kind: str, path: Path, *more: str) -> Path:
        out = tmp_path / f"shards-{path.name}"
        options = ("--resolution", "8", "--palette.colors", "64", "--workers", "2", "--views.random_crop", "never")
        result = run(
            *("shards", "--config", CONFIGS / f"{kind}.yaml", "--source.path", path),
            *(*options, "--out", out, *more),
        )
        assert result.code == 0, result.err
        return out

    return prepared
