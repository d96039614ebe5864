"""A grid of synthetic runs."""

from pathlib import Path

import pytest

from tests.pipeline.scaling.synthetic import write_grid

BUDGETS = (200, 600, 2000, 6000, 20000)


@pytest.fixture(scope="session")
def grid(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """35 finished cosine runs, with errors of 0.1%."""
    return write_grid(tmp_path_factory.mktemp("grid"), BUDGETS, 0.001)
