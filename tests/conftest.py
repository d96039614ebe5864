"""Programs that tests start are forked from a process that has the large packages imported."""

from tests import launch
from tests.fork_server import ForkServer

launch.fork_server = ForkServer()
