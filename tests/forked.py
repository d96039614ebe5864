"""python forked.py SOCKET ARGUMENTS...: as `python ARGUMENTS...`, but forked by the fork server of a test.

For commands of this project that start other programs themselves: such a program costs a tenth of a second of CPU time
instead of five.
"""

import json
import os
import shlex
import socket
import socketserver
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.fork_server import ForkServer


@contextmanager
def serving(fork_server: "ForkServer") -> Iterator[str]:
    """Yields a command that stands for `python`."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            request = json.loads(self.rfile.readline())
            log = Path(request["log"])
            log.touch()
            assert fork_server.suits(request["environment"])
            code = fork_server.start(request["arguments"], request["environment"], log, 0).wait()
            self.wfile.write(f"{code}\n".encode())

    with TemporaryDirectory(prefix="forked-") as folder:
        address = f"{folder}/socket"
        with socketserver.ThreadingUnixStreamServer(address, Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield shlex.join([sys.executable, __file__, address])
            server.shutdown()


def main() -> int:
    """Asks for the program, waits for it, prints what it wrote. Returns its exit code."""
    address, *arguments = sys.argv[1:]
    log = f"{address}-{os.getpid()}.log"
    request = {"arguments": arguments, "environment": dict(os.environ), "log": log}
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(address)
        client.sendall(json.dumps(request).encode() + b"\n")
        code = int(client.makefile().readline())
    print(Path(log).read_text(), end="", flush=True)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
