"""The shard sets of the tests of mixtures, in a folder and on a server."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.http_server import Server, serve
from tests.pipeline.train.data.mixture_sets import write_numbered_set


@pytest.fixture(scope="module")
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sets of the module's IMAGES: their images by name."""
    folder = tmp_path_factory.mktemp("mixture")
    for mark, (name, images) in enumerate(request.module.IMAGES.items()):
        write_numbered_set(folder / name, mark, images)
    return folder


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Server]:
    with serve(root) as server:
        yield server
