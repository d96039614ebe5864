"""Programs that tests start are forked from a process that has the large packages imported."""

from collections.abc import Iterator

import pytest

from tests import launch
from tests.fork_server import ForkServer
from tests.forked import serving


@pytest.fixture(scope="session", autouse=True)
def fork_server() -> Iterator[None]:
    """Serves tests.launch until the last test has ended."""
    launch.fork_server = ForkServer()
    yield
    launch.fork_server.close()
    launch.fork_server = None


@pytest.fixture
def forked_python() -> Iterator[str]:
    """A command that stands for `python` and forks, for commands that start programs themselves."""
    assert launch.fork_server is not None
    with serving(launch.fork_server) as command:
        yield command
