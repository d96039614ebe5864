"""A local HTTP server for tests that can inject faults."""

import random
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: closing sends a reset instead of an orderly end."""


@dataclass
class Faults:
    """The share of responses with each kind of fault."""

    drop: float = 0.0
    """The connection breaks off after a random number of bytes, by a reset or by an orderly end."""
    stall: float = 0.0
    """Nothing is sent after a random number of bytes; the connection stays open."""
    busy: float = 0.0
    """Answered with 503."""
    short: float = 0.0
    """The Content-Length is too small, and only so many bytes are sent."""


@dataclass
class Server:
    """The state that tests check."""

    url: str = ""
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and Range header of each request."""
    dropped: int = 0
    stalled: int = 0
    busy: int = 0
    short: int = 0


class Handler(SimpleHTTPRequestHandler):
    """Files below a folder, with single ranges `bytes=FIRST-` and `bytes=FIRST-LAST`."""

    def __init__(
        self, *arguments: Any, state: Server, faults: Faults, ranges: bool, chance: random.Random, **options: Any
    ) -> None:
        self.state, self.faults, self.ranges, self.chance = state, faults, ranges, chance
        super().__init__(*arguments, **options)

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.state.requests.append((self.path, asked))
        path = Path(self.translate_path(self.path))
        if self._happens("busy"):
            self.send_error(503)
        elif not path.is_file():
            self.send_error(404)
        else:
            self._send(path.read_bytes(), asked if self.ranges else None)

    def _send(self, content: bytes, asked: str | None) -> None:
        total, first, last = len(content), 0, len(content) - 1
        if asked:
            start, _, end = asked.removeprefix("bytes=").partition("-")
            first, last = int(start), min(int(end or last), last)
            if first >= total:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{total}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
        content = content[first : last + 1]
        if self._happens("short"):
            content = content[: self.chance.randrange(len(content) + 1)]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(content)))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
        self.end_headers()
        if self._happens("drop", "dropped"):
            self._send_some(content)
            if self.chance.random() < 0.5:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            self.close_connection = True
        elif self._happens("stall", "stalled"):
            self._send_some(content)
            self.server.stopped.wait()  # type: ignore[attr-defined]
        else:
            self.wfile.write(content)

    def _send_some(self, content: bytes) -> None:
        self.wfile.write(content[: self.chance.randrange(len(content) + 1)])
        self.wfile.flush()

    def _happens(self, fault: str, counter: str = "") -> bool:
        happens = self.chance.random() < getattr(self.faults, fault)
        if happens:
            setattr(self.state, counter or fault, getattr(self.state, counter or fault) + 1)
        return happens

    def log_message(self, *_: Any) -> None:
        pass


class StoppableServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, *arguments: Any) -> None:
        self.stopped = threading.Event()
        super().__init__(*arguments)

    def handle_error(self, *_: Any) -> None:
        """Readers that disconnect early are expected."""


@contextmanager
def serve(
    folder: Path,
    *,
    drop: float = 0.0,
    stall: float = 0.0,
    busy: float = 0.0,
    short: float = 0.0,
    ranges: bool = True,
    seed: int = 0,
) -> Iterator[Server]:
    """Serves the files below a folder over HTTP while the block runs.

    drop, stall, busy, short: the shares of answers that go wrong so, see Faults; seed: which ones, for
    requests that come one after the other. ranges=False answers every request with the whole file.
    """
    state = Server()
    faults = Faults(drop, stall, busy, short)
    chance = random.Random(seed)
    handler = partial(Handler, directory=str(folder), state=state, faults=faults, ranges=ranges, chance=chance)
    with StoppableServer(("127.0.0.1", 0), handler) as server:
        state.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield state
        finally:
            server.stopped.set()
            server.shutdown()
            thread.join()
