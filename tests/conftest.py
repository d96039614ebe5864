"""Programs that tests start are forked from a process that has the large packages imported."""

import os
import signal
from collections.abc import Iterator

import pytest

from tests import launch
from tests.fork_server import ForkServer
from tests.forked import serving


@pytest.fixture(scope="session", autouse=True)
def fork_server() -> Iterator[None]:
    """Serves tests.launch until the last test has ended."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored, which programs would inherit
    launch.fork_server = ForkServer()
    yield
    launch.fork_server.close()
    launch.fork_server = None


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """Restores the variables that a test's own process sets: with others, later programs would not be forked."""
    before = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    yield
    for key in set(os.environ) - set(before):
        if not key.startswith("PYTEST_"):
            del os.environ[key]
    os.environ.update(before)


@pytest.fixture
def forked_python() -> Iterator[str]:
    """A command that stands for `python` and forks, for commands that start programs themselves."""
    assert launch.fork_server is not None
    with serving(launch.fork_server) as command:
        yield command
