"""Reads files from disk, from a command (`pipe:`), over http(s), or from an object store.

A broken connection is opened again at the byte reached. Therefore http is read with the standard library and Range
headers: webdataset's gopen runs `curl`, which can't resume in the middle, and fsspec's http needs the package aiohttp,
which nothing else here needs. Commands run in `sh`, as in webdataset, but with a time-out: gopen waits two hours for
one that hangs. Object stores (s3://, gs://, hf://, ...) go through fsspec, whose back-ends have their own time-outs.
"""

import hashlib
import http.client
import io
import logging
import os
import re
import select
import shlex
import signal
import socket
import ssl
import subprocess
import urllib.error
import urllib.request
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast
from urllib.parse import urlsplit

from data_prep.common.files import atomic_write
from data_prep.common.retry import backoff, retry
from data_prep.shards.addresses import hide_secrets, split_credentials

logger = logging.getLogger(__name__)

ATTEMPTS = 6
"""Consecutive attempts without a byte after which reading fails."""
FIRST_PAUSE = 0.1
"""Seconds before the second attempt; each further pause is four times as long, half a minute in total."""
LOGGED_AFTER = 3
"""Consecutive attempts without a byte after which a warning is logged."""
TIMEOUT = 60.0
"""Seconds without a byte after which an attempt fails."""
BUFFER = 1 << 18
"""Bytes read ahead."""
STORE_BLOCK = 1 << 23
"""Bytes of one request to an object store."""
RETRIED_CODES = (408, 425, 429)
"""HTTP codes that are retried, besides all from 500 on."""
AUTHORIZATION = "Authorization"
PIPE = "pipe:"
CONNECTION_ERRORS = (OSError, http.client.HTTPException)
"""Errors that are retried."""


class Connection(Protocol):
    """The bytes of a file from some offset on. A broken connection raises OSError or ends too early."""

    def readinto(self, buffer: Any, /) -> int | None: ...

    def close(self) -> None: ...


def is_remote(address: str) -> bool:
    """Whether it is a URL (`scheme://...` or `pipe:...`), not a path."""
    return address.startswith(PIPE) or re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", address) is not None


def address_of(base: str, file: str) -> str:
    """The URL of a file below a base URL.

    The file replaces `{}` in the base, such as `pipe:aws s3 cp s3://bucket/set/{} -`. Without `{}` it is appended, to
    a URL after a slash, to a `pipe:` command without one.
    """
    if base.startswith(PIPE):
        file = shlex.quote(file)  # the name may come from a manifest, and a shell runs the command
        return base.replace("{}", file) if "{}" in base else base + file
    return base.replace("{}", file) if "{}" in base else f"{base.rstrip('/')}/{file}"


def open_remote(address: str, start: int = 0, size: int | None = None) -> BinaryIO:
    """Opens a file for reading from byte `start`. `size` is the size of the complete file; default: requested.

    Raises ValueError naming the URL, here or at the first read, if the file does not exist, access is denied, the URL
    or the server's certificate is invalid, or a package is missing. Reading raises OSError naming the URL, the byte
    reached and the last error after ATTEMPTS consecutive attempts without a byte.
    """
    return cast(BinaryIO, io.BufferedReader(RemoteFile(address, start, size), BUFFER))


def read_remote(address: str) -> bytes:
    """The content of a small file. Raises like `open_remote`."""
    with open_remote(address) as file:
        return file.read()


def download(address: str, path: Path, size: int, sha256: str) -> None:
    """Copies a file of `size` bytes to `path`, atomically.

    Raises ValueError naming the URL if its sha256 differs twice, and raises like `open_remote`.
    """
    with atomic_write(path) as temporary:
        for _ in range(2):  # a second transfer helps if the first was damaged, not if the file is
            found = _copy(address, temporary, size)
            if found == sha256:
                return
        raise ValueError(
            f"{hide_secrets(address)} has sha256 {found}, but must have {sha256}; it was changed or damaged."
        )


def _copy(address: str, path: Path, size: int) -> str:
    """Copies once; returns the sha256 of the copy."""
    digest = hashlib.sha256()
    with open_remote(address, size=size) as source, path.open("wb") as target:
        while block := source.read(1 << 20):
            digest.update(block)
            target.write(block)
    return digest.hexdigest()


class RemoteFile(io.RawIOBase):
    """A file that is read sequentially from one byte on. Use `open_remote`."""

    def __init__(self, address: str, start: int = 0, size: int | None = None) -> None:
        super().__init__()
        self.address, self.position, self.size = address, start, size
        self.shown = hide_secrets(address)
        """The address in messages."""
        self._connection: Connection | None = None

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        return retry(lambda: self._read(memoryview(buffer).cast("B")), CONNECTION_ERRORS, self._pause_after)

    def _read(self, view: memoryview) -> int:
        if self._connection is None and len(view) and self.position != self.size:
            self._connect()
        if self.size is not None:
            view = view[: self.size - self.position]
        if not len(view):
            return 0
        assert self._connection is not None
        count = self._connection.readinto(view) or 0
        if not count and self.size is not None:
            raise OSError("the connection ended early")
        self.position += count
        return count

    def _connect(self) -> None:
        self._connection, size = _open(self.address, self.position)
        if self.size is None:
            self.size = size
            if size is not None and self.position > size:
                raise ValueError(f"{self.shown} has {size} bytes, so byte {self.position} can't be read.")
        elif size is not None and size != self.size:
            raise OSError(f"it has {size} bytes, but must have {self.size}")

    def _disconnect(self) -> None:
        if self._connection is not None:
            with suppress(*CONNECTION_ERRORS):
                self._connection.close()
        self._connection = None

    def _pause_after(self, error: Exception, failures: int) -> float:
        """Seconds before the next attempt; raises OSError if it was the last attempt."""
        self._disconnect()
        reason = hide_secrets(str(error)) or type(error).__name__
        if failures == ATTEMPTS:
            position = f"byte {self.position}" + ("" if self.size is None else f" of {self.size}")
            what = f"broke off at {position}" if self.position or self.size else "can't be reached or read"
            raise OSError(f"{self.shown} {what}, {ATTEMPTS} attempts failed: {reason}") from error
        if failures == LOGGED_AFTER:
            logger.warning(f"{self.shown}: {reason}; retrying for half a minute")
        return backoff(failures, FIRST_PAUSE, factor=4)

    def close(self) -> None:
        self._disconnect()
        super().close()


def _open(address: str, start: int) -> tuple[Connection, int | None]:
    """A connection at byte `start`, and the size of the complete file if it is known.

    Raises ValueError if retrying can't help, else OSError or HTTPException.
    """
    if address.startswith(PIPE):
        return _skip_to(Command(address.removeprefix(PIPE)), start), None
    if re.match("https?://", address, re.IGNORECASE):
        return _open_http(address, start)
    if is_remote(address):
        return _open_store(address, start)
    try:
        file = Path(address).open("rb", buffering=0)  # noqa: SIM115  (the RemoteFile closes it)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise ValueError(f"{address} can't be read: {error.strerror}.") from error
    file.seek(start)
    return cast(Connection, file), os.fstat(file.fileno()).st_size


def _skip_to(connection: Connection, start: int) -> Connection:
    """Reads and drops the bytes before `start`, for connections that can only be opened at byte 0."""
    buffer = memoryview(bytearray(1 << 20))
    try:
        while start:
            count = connection.readinto(buffer[:start])
            if not count:
                raise OSError(f"it ended {start} bytes before the byte to resume from")
            start -= count
    except BaseException:
        connection.close()
        raise
    return connection


class Command:
    """The output of a shell command, as a connection. Raises OSError if the command fails or writes nothing in time."""

    def __init__(self, command: str) -> None:
        self._process = subprocess.Popen(
            command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # so that all of its processes can be killed, not only the shell
        )
        assert self._process.stdout is not None
        self._output = cast(io.FileIO, self._process.stdout)
        self._poll = select.poll()
        self._poll.register(self._output, select.POLLIN)

    def readinto(self, buffer: Any, /) -> int:
        if not self._poll.poll(TIMEOUT * 1000):
            raise OSError(f"the command wrote nothing for {TIMEOUT:.0f} s")
        count = self._output.readinto(buffer) or 0
        if not count:
            self._check_exit()
        return count

    def _check_exit(self) -> None:
        try:
            code = self._process.wait(TIMEOUT)
        except subprocess.TimeoutExpired as error:
            raise OSError("the command closed its output but did not exit") from error
        if code:
            raise OSError(f"the command failed with exit code {code}")

    def close(self) -> None:
        self._output.close()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Redirects(urllib.request.HTTPRedirectHandler):
    """Sends the credentials of a URL also to where the same server redirects, but to no other server."""

    def redirect_request(
        self, request: urllib.request.Request, file: Any, code: int, reason: str, headers: Any, url: str
    ) -> urllib.request.Request | None:
        clean, authorization = split_credentials(url)
        new = super().redirect_request(request, file, code, reason, headers, clean)
        if new is not None and urlsplit(new.full_url)[:2] == urlsplit(request.full_url)[:2]:
            # Not the requests' hosts: behind a proxy they are the proxy's.
            authorization = authorization or request.get_header(AUTHORIZATION)
        if new is not None and authorization is not None:
            new.add_unredirected_header(AUTHORIZATION, authorization)
        return new


@cache
def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(Redirects)


def _open_http(address: str, start: int) -> tuple[Connection, int | None]:
    url, authorization = split_credentials(address)
    # A range is requested for byte 0 too: its response has the complete size, even if its own length is wrong.
    headers = {"Range": f"bytes={start}-", "Accept-Encoding": "identity", "User-Agent": "data_prep"}
    request = urllib.request.Request(url, headers=headers)
    if authorization is not None:
        request.add_unredirected_header(AUTHORIZATION, authorization)
    shown = hide_secrets(address)
    try:
        answer = _opener().open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        size = _size_of_range(error.headers)
        error.close()
        if error.code == 416 and size is not None:
            return io.BytesIO(), size
        if error.code < 500 and error.code not in RETRIED_CODES:
            raise ValueError(f"{shown} can't be read: HTTP {error.code} {error.reason}.") from error
        raise
    except urllib.error.URLError as error:
        if _is_hopeless(error.reason, start):
            raise ValueError(f"{shown} can't be read: {error.reason}.") from error
        raise
    except (http.client.InvalidURL, UnicodeError) as error:  # UnicodeError: a host name
        raise ValueError(f"{shown} is not a valid URL: {error}.") from error
    if answer.status == 206:
        first = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
        if not first or int(first[1]) != start:
            answer.close()
            raise OSError(f"byte {start} was requested, the server sent {answer.headers.get('Content-Range')}")
        return answer, _size_of_range(answer.headers)
    length = answer.headers.get("Content-Length", "")
    return _skip_to(answer, start), int(length) if length.isdecimal() else None


def _is_hopeless(reason: Any, start: int) -> bool:
    """Whether a request that failed for this reason would fail again: an unknown host, a wrong certificate.

    A host is known if bytes before `start` were read; then the name server fails for a while.
    """
    unknown = not start and isinstance(reason, socket.gaierror) and reason.errno == socket.EAI_NONAME
    return unknown or isinstance(reason, ssl.SSLCertVerificationError | str)


def _size_of_range(headers: Any) -> int | None:
    size = re.match(r"bytes .*/(\d+)$", headers.get("Content-Range", ""))
    return int(size[1]) if size else None


def _open_store(address: str, start: int) -> tuple[Connection, int | None]:
    import fsspec

    try:
        store, path = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:  # a missing back-end, an unknown scheme
        reason = hide_secrets(" ".join(str(error).split()))
        raise ValueError(f"{hide_secrets(address)} can't be read: {reason}.") from error
    try:
        file = store.open(path, "rb", block_size=STORE_BLOCK)
        file.seek(start)
        return StoreFile(file), file.size
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise ValueError(f"{hide_secrets(address)} can't be read: {type(error).__name__}.") from error
    except OSError:
        raise
    except Exception as error:  # back-ends have exceptions of their own
        raise OSError(f"{type(error).__name__}: {error}") from error


class StoreFile:
    """A file in an object store, as a connection. Raises OSError in place of the back-end's own exceptions."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readinto(self, buffer: Any, /) -> int:
        try:
            return self._file.readinto(buffer)
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        self._file.close()
