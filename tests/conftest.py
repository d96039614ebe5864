"""Programs that tests start are forked from a process that has the large packages imported."""

from collections.abc import Iterator

import pytest

from tests import launch
from tests.fork_server import ForkServer


@pytest.fixture(scope="session", autouse=True)
def fork_server() -> Iterator[None]:
    """Serves tests.launch until the last test has ended."""
    launch.fork_server = ForkServer()
    yield
    launch.fork_server.close()
    launch.fork_server = None
