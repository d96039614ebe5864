"""URLs with secrets: what a server gets, and that nobody else does."""

import base64
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from data_prep.config import DataConfig, SourceConfig
from data_prep.shards import remote
from data_prep.shards.addresses import hide_secrets, split_credentials
from data_prep.shards.reader import ShardSet
from data_prep.shards.remote import read_remote
from tests.data_prep.tar_files import encode_image, tar_bytes

BASIC = "Basic " + base64.b64encode(b"me:s/e@c ret").decode()


class Handler(BaseHTTPRequestHandler):
    """Answers with `content`, or redirects to `target`; records path and Authorization."""

    def __init__(self, *arguments: Any, requests: list[Any], content: bytes, target: str, needed: str | None) -> None:
        self.requests, self.content, self.target, self.needed = requests, content, target, needed
        super().__init__(*arguments)

    def do_GET(self) -> None:
        self.requests.append((self.path, self.headers.get("Authorization")))
        if self.needed is not None and self.headers.get("Authorization") != self.needed:
            self.send_error(401)
        elif self.target and not self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", self.target)
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.content)))
            self.end_headers()
            self.wfile.write(self.content)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serve(content: bytes = b"data", target: str = "", needed: str | None = None) -> Iterator[tuple[str, list[Any]]]:
    """Yields host:port, and (path, Authorization) of each request."""
    requests: list[Any] = []
    handler = partial(Handler, requests=requests, content=content, target=target, needed=needed)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}", requests
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 100)  # a retry would exceed the time of the test
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_user_and_password_are_a_header() -> None:
    with serve(needed=BASIC) as (host, requests):
        assert read_remote(f"http://me:s%2Fe%40c%20ret@{host}/a/b.tar") == b"data"
        assert requests == [("/a/b.tar", BASIC)]
        with pytest.raises(ValueError, match=rf"^http://{host}/a.tar\?\.\.\. can't be read: HTTP 401") as caught:
            read_remote(f"http://me:wrong@{host}/a.tar?token=T0KEN")
    assert "wrong" not in str(caught.value) and "T0KEN" not in str(caught.value)


def test_a_redirection_passes_credentials_to_the_same_server_only() -> None:
    with ExitStack() as stack:
        other, of_other = stack.enter_context(serve())
        host, requests = stack.enter_context(serve(target="/moved", needed=BASIC))
        away, of_away = stack.enter_context(serve(target=f"http://{other}/x", needed=BASIC))
        for server in (host, away):
            assert read_remote(f"http://me:s%2Fe%40c%20ret@{server}/a") == b"data"
        assert requests == [("/a", BASIC), ("/moved", BASIC)]
        assert of_away == [("/a", BASIC)]
        assert of_other == [("/x", None)]


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        ("/with space/b\u00fccher.tar", "/with%20space/b%C3%BCcher.tar"),
        ("/a%2Fb.tar?X-Sig=a%2Fb%3D&e=9", "/a%2Fb.tar?X-Sig=a%2Fb%3D&e=9"),
        ("/a+b(1)[2]~*,;=:@!$'.tar", "/a+b(1)[2]~*,;=:@!$'.tar"),
    ],
)
def test_every_path_is_sent_in_ascii(path: str, sent: str) -> None:
    with serve() as (host, requests):
        read_remote(f"http://{host}{path}")
        assert requests == [(sent, None)]


@pytest.mark.parametrize(
    "address",
    [
        *("https:///a.tar", "http://me:SECRET@/a.tar", "http://host:99999/a.tar?sig=SECRET", "http://host:0/a.tar"),
        *(
            "http://me:SEC/RET@host/a.tar",
            "http://me:SEC?RET@host/a",
            "http://[::1/a?SECRET",
            "http://host:port/x?SECRET",
        ),
        "http://nobody.invalid/a.tar?sig=SECRET",
        "http://me:SECRET@host..name/a.tar",
    ],
)
def test_hopeless_addresses_are_not_retried(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any) -> None:
        raise remote.socket.gaierror(remote.socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(remote.socket, "getaddrinfo", unknown)
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"is not a valid URL|Name or service not known") as caught:
        read_remote(address)
    assert "SEC" not in str(caught.value)
    assert time.monotonic() - started < 50


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:secret@host:80/a/{00..99}.tar", "https://host:80/a/{00..99}.tar"),
        ("https://token@host/a", "https://host/a"),
        ("https://me:p@ss@host/a@b", "https://host/a@b"),
        ("https://me:p/ss@host/a", "https://host/a"),
        ("https://host/a@b/c:d", "https://host/a@b/c:d"),
        ("https://user:pa'ss@host/set", "https://host/set"),
        ('pipe:curl "https://user:p\\a\'s"s@host/set?t=1"', 'pipe:curl "https://host/set?..."'),
        ("['https://host/a','https://me:pw@host/b']", "['https://host/a','https://host/b']"),
        ("curl 'https://host/a' me@host", "curl 'https://host/a' me@host"),
        ("https://host/{}?key=1&sig=a/b", "https://host/{}?..."),
        ("pipe:curl -s 'https://me:pw@host/x?t=1' | zstd -dc", "pipe:curl -s 'https://host/x?...' | zstd -dc"),
        ("s3://bucket/{0..9}.tar", "s3://bucket/{0..9}.tar"),
        ("/data/what?/a@b.tar", "/data/what?/a@b.tar"),
    ],
)
def test_secrets_are_hidden(text: str, shown: str) -> None:
    assert hide_secrets(text) == shown == hide_secrets(shown)


def test_credentials_as_in_rfc_7617() -> None:
    assert split_credentials("https://Aladdin:open%20sesame@h/a") == (
        "https://h/a",
        "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==",
    )


def test_nothing_that_is_shown_or_stored_has_a_secret(
    tmp_path: Path, run: Callable[..., Any], small: tuple[Any, Any]
) -> None:
    members = [(f"{n:03d}.jpg", encode_image(small[0][n])) for n in range(20)]
    members[5] = ("005.jpg", b"<html>")
    options = ["--source.kind", "webdataset", "--resolution", "8", "--palette.colors", "16", "--workers", "1"]
    options += ["--max_skipped", "0.1", "--out", tmp_path / "set"]
    with serve(tar_bytes(members), needed=BASIC) as (host, _):
        address = f"http://me:s%2Fe%40c%20ret@{host}/a.tar"
        failed = run("shards", *options, "--source.path", f"{address}?sig=S1G", "--max_skipped", "0")
        done = run("shards", *options, "--source.path", f"{address}?sig=NEWS1G")  # it resumes, signed again
    assert (failed.code, done.code) == (2, 0), failed.err + done.err
    assert f"005.jpg in http://{host}/a.tar?...: not a picture (it is an HTML page" in failed.err
    texts = [failed.err, done.err, *(p.read_bytes().decode("latin-1") for p in tmp_path.rglob("*") if p.is_file())]
    assert not [text for text in texts if "s%2Fe" in text or "S1G" in text or "me:" in text]


def test_a_set_and_its_configuration_show_no_secret() -> None:
    source = SourceConfig(kind="webdataset", path="https://me:pw@host/{0..9}.tar?sig=1")
    assert DataConfig(source=source).to_dict()["source"]["path"] == "https://host/{0..9}.tar?..."
    manifest: Any = {"source": {"name": "x"}, "classes": [], "resolution": 8, "splits": {}}
    shards = ShardSet("https://me:pw@host/set", manifest | {"palette": {"colors": 2, "sha256": ""}}, None)  # type: ignore[arg-type]
    assert (shards.path, shards.address) == ("https://host/set", "https://me:pw@host/set")
