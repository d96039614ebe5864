"""Complete bytes over connections that break, for each kind of URL, and errors that name the URL and the byte."""

import hashlib
import io
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from data_prep.shards import remote
from data_prep.shards.remote import RemoteFile, address_of, download, is_remote, open_remote, read_remote
from tests.http_server import serve

SIZE = 600_000


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.001)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def content() -> bytes:
    return np.random.default_rng(0).bytes(SIZE)


@pytest.fixture
def folder(tmp_path: Path, content: bytes) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "file").write_bytes(content)
    (folder / "empty").write_bytes(b"")
    return folder


def read(address: str, **options: Any) -> bytes:
    with open_remote(address, **options) as file:
        return file.read()


@contextmanager
def seconds_below(limit: float) -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < limit


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        *(("pipe:cat x", True), ("https://a/b", True), ("s3://a/b", True), ("hf://datasets/a/b", True)),
        *(("/a/b.tar", False), ("a/{00..01}.tar", False), ("./a:b//c", False), ("pipes/a", False)),
    ],
)
def test_is_remote(address: str, expected: bool) -> None:
    assert is_remote(address) is expected


@pytest.mark.parametrize(
    ("base", "address"),
    [
        ("/sets/a", "/sets/a/f.tar"),
        ("https://host/a/", "https://host/a/f.tar"),
        ("https://host/a/{}?key=1", "https://host/a/f.tar?key=1"),
        ("pipe:aws s3 cp s3://b/{} - | cat", "pipe:aws s3 cp s3://b/f.tar - | cat"),
        ("pipe:cat /sets/", "pipe:cat /sets/f.tar"),
    ],
)
def test_address_of(base: str, address: str) -> None:
    assert address_of(base, "f.tar") == address


def test_a_file_name_can_not_run_a_command(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1")
    with pytest.raises(OSError, match="exit code"):
        read_remote(address_of(f"pipe:cat {tmp_path}/", "y; echo done"))


@pytest.mark.parametrize("start", [0, 1, 300_000, SIZE])
def test_every_kind_of_url_reads_the_same(folder: Path, content: bytes, start: int) -> None:
    store = fsspec.filesystem("memory")
    store.pipe("/set/file", content)
    with serve(folder) as server:
        ways = [f"{folder}/file", f"pipe:cat {folder}/file", f"{server.url}/file", "memory://set/file"]
        for address in ways:
            assert read(address, start=start) == content[start:], address
        assert server.requests == [("/file", f"bytes={start}-")]


def test_reading_ends_at_the_given_size(folder: Path, content: bytes) -> None:
    with serve(folder, ranges=False) as server:
        for address in (f"pipe:cat {folder}/file; sleep 100", f"{server.url}/file"):
            with seconds_below(10):
                assert read(address, start=10, size=SIZE) == content[10:]


def test_an_empty_file(folder: Path) -> None:
    with serve(folder) as server, serve(folder, ranges=False) as plain:
        for address in (f"{folder}/empty", f"pipe:cat {folder}/empty", f"{server.url}/empty", f"{plain.url}/empty"):
            assert read(address) == b""


@pytest.mark.parametrize("seed", range(4))
def test_dropped_connections_resume_at_their_byte(folder: Path, content: bytes, seed: int) -> None:
    with serve(folder, drop=0.7, seed=seed) as server:
        assert b"".join(read(f"{server.url}/file") for _ in range(5)) == content * 5
        starts = [int(str(asked).removeprefix("bytes=").removesuffix("-")) for _, asked in server.requests]
    assert server.dropped > 2
    assert len(server.requests) == server.dropped + 5
    assert sum(start > 0 for start in starts) > 2  # it went on, not back


@pytest.mark.parametrize("fault", ["drop", "busy", "short", "stall"])
@pytest.mark.parametrize("ranges", [True, False])
def test_faults_are_retried(
    folder: Path, content: bytes, fault: str, ranges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "TIMEOUT", 0.1)
    with serve(folder, ranges=ranges, seed=1, **{fault: 0.3}) as server, seconds_below(10):
        for _ in range(12):
            assert read(f"{server.url}/file", size=SIZE) == content
        assert server.dropped + server.busy + server.short + server.stalled > 1


def test_an_unreachable_server_is_an_error(folder: Path, content: bytes) -> None:
    with serve(folder, busy=1.0) as server:
        with pytest.raises(OSError, match=rf"{server.url}/file can't be reached or read, 6 attempts failed: .*503"):
            read(f"{server.url}/file")
        assert len(server.requests) == remote.ATTEMPTS
    with pytest.raises(OSError, match=r"can't be reached or read, 6 attempts failed: .*refused"):
        read(f"{server.url}/file")


def test_the_error_names_the_byte_reached(folder: Path, content: bytes) -> None:
    with serve(folder) as server:
        file = open_remote(f"{server.url}/file")
        assert file.read(100) == content[:100]
        (folder / "file").write_bytes(content[:200])  # a changed file is not taken for the rest of the first
        file.raw._disconnect()  # type: ignore[attr-defined]
        with pytest.raises(OSError, match=rf"byte {remote.BUFFER} of {SIZE}, 6 attempts failed: it has 200 bytes"):
            file.read()


def test_progress_resets_the_count_of_attempts(folder: Path, content: bytes) -> None:
    """More breaks than ATTEMPTS in one file, each after some bytes."""

    class Crumbs(io.BytesIO):
        def readinto(self, buffer: Any, /) -> int:
            if self.tell() > start + 50_000:
                raise ConnectionResetError("reset")
            return super().readinto(memoryview(buffer)[:30_000])

    start = 0

    def opened(address: str, position: int) -> tuple[Any, int]:
        nonlocal start
        start = position
        file = Crumbs(content)
        file.seek(position)
        return file, SIZE

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "_open", opened)
        assert read("x://y") == content


@pytest.mark.parametrize(
    "address", ["{folder}/nope", "{folder}", "{url}/nope", "memory://nope", "nope://a/b", "{url}/with space"]
)
def test_a_missing_file_is_not_retried(folder: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 100)
    with serve(folder) as server:
        address = address.format(folder=folder, url=server.url)
        with pytest.raises(ValueError, match=address):
            read(address)


def test_a_start_after_the_end_is_an_error(folder: Path) -> None:
    with serve(folder) as server:
        for address in (f"{folder}/file", f"{server.url}/file"):
            with pytest.raises(ValueError, match=f"{address} has {SIZE} bytes, so byte {SIZE + 1} can't be read"):
                read(address, start=SIZE + 1)


def test_a_failing_command_is_retried_and_then_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"byte 5000, 6 attempts failed: the command failed with exit code 7"):
        read(f"pipe:echo >> {tmp_path}/runs; head -c 5000 {folder}/file; exit 7")
    assert (tmp_path / "runs").read_text() == "\n" * remote.ATTEMPTS


def test_a_command_that_breaks_off_resumes_at_its_byte(folder: Path, content: bytes, tmp_path: Path) -> None:
    command = f"echo >> {tmp_path}/runs; head -c $(($(wc -l < {tmp_path}/runs) * 250000)) {folder}/file"
    assert read(f"pipe:{command}", size=SIZE) == content
    assert read(f"pipe:rm {tmp_path}/runs; {command}") == content[:250000]  # it ended with code 0, so that is all


def test_a_silent_command_is_killed_with_all_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "TIMEOUT", 0.05)
    pause = f'{sys.executable} -c \'import time; open("{tmp_path}/pid", "a"); time.sleep(100)\''
    with seconds_below(10), pytest.raises(OSError, match=r"byte 1, 6 attempts failed: the command wrote nothing"):
        read(f"pipe:printf x; {pause} | cat")


def test_closing_early_kills_the_command(folder: Path) -> None:
    with seconds_below(5), open_remote(f"pipe:cat {folder}/file; sleep 100") as file:
        assert len(file.read(10)) == 10


def test_a_broken_read_from_an_object_store_resumes(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    class Expired(Exception):
        """Not an OSError, like the exceptions of back-ends."""

    breaks = iter([0, 1, 1, 0, 1, 0, 0, 1] + [0] * 100)
    plain = fsspec.implementations.memory.MemoryFile.readinto

    def readinto(self: Any, buffer: Any) -> int:
        if next(breaks):
            raise Expired("token")
        return plain(self, memoryview(buffer)[:100_000])

    fsspec.filesystem("memory").pipe("/set/file", content)
    monkeypatch.setattr(fsspec.implementations.memory.MemoryFile, "readinto", readinto, raising=False)
    assert read("memory://set/file") == content


def test_a_missing_back_end_is_named() -> None:
    pytest.importorskip("fsspec")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "s3fs", None)
        with pytest.raises(ValueError, match=r"s3://bucket/x can't be read: .*s3fs"):
            read("s3://bucket/x")


def test_downloads_are_compared_with_their_digest(folder: Path, content: bytes, tmp_path: Path) -> None:
    digest = hashlib.sha256(content).hexdigest()
    with serve(folder, drop=0.5, seed=3) as server:
        download(f"{server.url}/file", tmp_path / "copy", SIZE, digest)
    assert (tmp_path / "copy").read_bytes() == content


def test_a_damaged_download_is_retried_and_leaves_no_file(folder: Path, content: bytes, tmp_path: Path) -> None:
    digest = hashlib.sha256(content).hexdigest()
    with serve(folder) as server:
        with pytest.raises(ValueError, match=rf"{server.url}/file has sha256 {digest}, but must have 00; "):
            download(f"{server.url}/file", tmp_path / "copy", SIZE, "00")
        assert len(server.requests) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["files"]


def test_a_transfer_damaged_once_is_retried(folder: Path, content: bytes, tmp_path: Path) -> None:
    """The first run of the command changes a byte."""
    first = f"test -e {tmp_path}/ran || (touch {tmp_path}/ran; printf '\\377\\377\\377\\377\\377')"
    digest = hashlib.sha256(content).hexdigest()
    download(f"pipe:{first}; cat {folder}/file", tmp_path / "copy", SIZE, digest)
    assert (tmp_path / "copy").read_bytes() == content


def test_small_reads(folder: Path, content: bytes) -> None:
    """Through a raw RemoteFile, as a reader of blocks does."""
    file = RemoteFile(f"{folder}/file")
    assert file.read(7) + file.read(11) == content[:18]
    assert file.tell() == 18
    file.close()
    file.close()
