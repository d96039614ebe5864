"""A local model hub with the HTTP API that huggingface_hub uses; tests can make it fail.

What it answers is what huggingface_hub 1.31 and 2.4 ask for: create, refs, trees, revisions, preupload, LFS batch and
upload, commits with a parent, branches, tags, downloads with ranges, the check of a card's metadata. It has no xet
storage.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.hub_repositories import File, Repositories, Repository

TOKEN = "hf_" + "Q" * 34
LFS_SIZE = 10_000_000
LFS_SUFFIXES = (".safetensors", ".bin", ".npy", ".png", ".tar")
MODES = ("main", "refs", "tree", "revision", "preupload", "commit", "branch", "tag")
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: closing sends a reset in place of an orderly end."""


@dataclass
class Fault:
    """What goes wrong with some requests: a status, a connection that breaks off in the body ("drop"), or one that
    breaks off when the work is done ("lost")."""

    method: str
    path: str
    how: int | Literal["drop", "lost"]
    times: int
    headers: dict[str, str]


class Hub(Repositories):
    """What is stored, and what was asked."""

    def __init__(self, token: str) -> None:
        super().__init__()
        self.token = token
        self.requests: list[str] = []
        self.bytes_sent = 0
        """Of files, by clients."""
        self.faults: list[Fault] = []
        self.before_commit: Callable[[Repository], None] | None = None
        """Called once, before the next commit is processed."""
        self.lock = threading.RLock()
        self.url = ""
        self._server: ThreadingHTTPServer | None = None
        self._port = 0

    def fail(self, method: str, path: str, how: int | Literal["drop", "lost"], times: int = 1, **headers: str) -> None:
        """Lets the next requests go wrong whose path holds `path`."""
        self.faults.append(Fault(method, path, how, times, {key.replace("_", "-"): headers[key] for key in headers}))

    def next_fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and fault.method == method and fault.path in path:
                fault.times -= 1
                return fault
        return None

    def start(self) -> None:
        """Listens; after a `stop`, where it listened before."""
        server = _Server(("127.0.0.1", self._port), partial(_Handler, hub=self))
        self._server, self._port = server, server.server_address[1]
        self.url = f"http://127.0.0.1:{self._port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Refuses connections, and closes open ones."""
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
        for connection in self._server.connections:
            _reset(connection)

    def away(self, seconds: float) -> None:
        """Stops, and comes back by itself."""
        self.stop()
        threading.Timer(seconds, self.start).start()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, *arguments: Any) -> None:
        self.connections: list[socket.socket] = []
        super().__init__(*arguments)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address

    def handle_error(self, *_: Any) -> None:
        """Clients that leave early are no news."""


def _reset(connection: socket.socket) -> None:
    with suppress(OSError):  # closed already
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        connection.shutdown(socket.SHUT_RDWR)
        connection.close()


class _Refused(Exception):
    def __init__(self, status: int, code: str, message: str, **facts: str) -> None:
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message}
        self.body = {"error": message, "errors": [{"message": message}], "warnings": []} | facts


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, *arguments: Any, hub: Hub) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        path = unquote(address.path)
        self.hub.requests.append(f"{self.command} {path}")
        fault = self.hub.next_fault(self.command, path)
        if fault is not None and fault.how == "drop":
            self._break_off()
            return
        self.body = self._read_body()
        if fault is not None and isinstance(fault.how, int):
            self._answer(fault.how, {"error": "injected fault"}, fault.headers)
            return
        try:
            with self.hub.lock:
                self._route(path, parse_qs(address.query), lost=fault is not None)
        except _Refused as refused:
            self._answer(refused.status, refused.body, refused.headers)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _break_off(self) -> None:
        """Reads some of the body, then resets the connection."""
        self.rfile.read(min(1000, int(self.headers.get("Content-Length") or 0)))
        _reset(self.connection)
        self.close_connection = True

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _route(self, path: str, query: dict[str, list[str]], *, lost: bool) -> None:
        answer: Any
        headers: dict[str, str] = {}
        status = 200
        if match := re.fullmatch(r"/lfs/(\w{64})", path):  # its address is its permission
            answer = self._upload(match[1])
        elif path == "/api/validate-yaml":  # anybody may ask
            answer = self._validate()
        else:
            self._check_token()
            if path == "/api/repos/create":
                answer = self._create()
            elif match := re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
                answer = self._batch()
            elif match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(\w+))?(?:/(.+))?", path):
                answer = self._api(f"{match[1]}/{match[2]}", match[3] or "main", match[4] or "main", query)
            elif match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                status, answer, headers = self._resolve(f"{match[1] or 'models/'}{match[2]}", match[3], match[4])
            else:
                raise _Refused(404, "NotFound", f"no such path: {path}")
        if lost:
            _reset(self.connection)
            self.close_connection = True
        else:
            self._answer(status, answer, headers)

    def _check_token(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            raise _Refused(401, "Unauthorized", "Invalid username or password.")

    def _create(self) -> dict[str, str]:
        asked = json.loads(self.body)
        name, kind = f"{asked['organization']}/{asked['name']}", asked.get("type", "model")
        key = f"{kind}s/{name}"
        url = f"{self.hub.url}/{name if kind == 'model' else key}"
        if key in self.hub.repositories:
            raise _Refused(409, "Conflict", "You already created this repository", url=url)
        repository = Repository(private=asked.get("visibility") == "private")
        self.hub.repositories[key] = repository
        attributes = self.hub.store(b"*.safetensors filter=lfs\n", lfs=False)
        self.hub.commit(repository, "main", "initial commit", {".gitattributes": File(attributes, 25, False)})
        return {"url": url, "name": name, "id": name}

    def _validate(self) -> dict[str, list[Any]]:
        """As far as huggingface_hub itself knows the rules."""
        from huggingface_hub import DatasetCardData, ModelCardData

        asked = json.loads(self.body)
        kind = ModelCardData if asked["repoType"] == "model" else DatasetCardData
        try:
            metadata = yaml.safe_load(asked["content"].split("---")[1])
            kind(**metadata).to_yaml()
        except Exception as error:
            raise _Refused(400, "BadRequest", f"the card's metadata can't be read: {error}") from error
        return {"errors": [], "warnings": []}

    def _batch(self) -> dict[str, Any]:
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.contents:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    def _upload(self, oid: str) -> dict[str, str]:
        self.hub.bytes_sent += len(self.body)
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refused(422, "BadDigest", "the content has another sha256")
        self.hub.store(self.body, lfs=True)
        return {}

    def _find(self, key: str, revision: str) -> tuple[Repository, str]:
        repository = self.hub.repositories.get(key)
        if repository is None:
            raise _Refused(404, "RepoNotFound", "Repository not found")
        commit = repository.find(revision)
        if commit is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, commit

    def _api(self, key: str, verb: str, rest: str, query: dict[str, list[str]]) -> Any:
        if verb not in MODES:
            raise _Refused(404, "NotFound", f"no {verb} here")
        revision, _, path = rest.partition("/") if verb == "tree" else (rest, "", "")
        if verb in ("branch", "tag"):
            return self._change_reference(key, verb, rest)
        repository, commit = self._find(key, revision)
        files = repository.commits[commit].files
        if verb in ("main", "revision"):
            names = [{"rfilename": name} for name in sorted(files)]
            about = {"_id": "0", "id": key.partition("/")[2], "private": repository.private, "tags": []}
            return about | {"sha": commit, "siblings": names, "downloads": 0, "likes": 0}
        if verb == "refs":
            return {
                "branches": [_reference("heads", *pair) for pair in repository.branches.items()],
                "tags": [_reference("tags", *pair) for pair in repository.tags.items()],
                "converts": [],
            }
        if verb == "tree":
            return [_entry(name, file) for name, file in sorted(files.items()) if name.startswith(path)]
        if verb == "preupload":
            return {"files": [_upload_mode(asked, files) for asked in json.loads(self.body)["files"]]}
        return self._commit(repository, revision, f"{self.hub.url}/{key.removeprefix('models/')}")

    def _change_reference(self, key: str, verb: str, rest: str) -> dict[str, Any]:
        repository, _ = self._find(key, "main")
        references = repository.branches if verb == "branch" else repository.tags
        asked = json.loads(self.body or b"{}")
        if self.command == "DELETE":
            if rest not in references:
                raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {rest}")
            del references[rest]
            return {}
        name, at = (rest, asked.get("startingPoint", "main")) if verb == "branch" else (asked["tag"], rest)
        if name in repository.branches | repository.tags:
            raise _Refused(409, "Conflict", "Reference already exists")
        references[name] = self._find(key, at)[1]
        return {}

    def _commit(self, repository: Repository, branch: str, url: str) -> dict[str, Any]:
        if self.hub.before_commit is not None:
            interfere, self.hub.before_commit = self.hub.before_commit, None
            interfere(repository)
        if branch not in repository.branches:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        head = repository.branches[branch]
        files = dict(repository.commits[head].files)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, head):
            raise _Refused(412, "PreconditionFailed", "A commit has happened since. Please refresh and try again.")
        for line in lines:
            self._apply(line["key"], line["value"], files)
        name = self.hub.commit(repository, branch, header["summary"], files)
        return {"success": True, "commitOid": name, "commitUrl": f"{url}/commit/{name}", "hookOutput": ""}

    def _apply(self, key: str, value: dict[str, Any], files: dict[str, File]) -> None:
        if key == "file":
            content = base64.b64decode(value["content"])
            self.hub.bytes_sent += len(content)
            files[value["path"]] = File(self.hub.store(content, lfs=False), len(content), False)
        elif key == "lfsFile":
            if value["oid"] not in self.hub.contents:
                raise _Refused(400, "BadRequest", f"LFS object {value['oid']} was not uploaded")
            files[value["path"]] = File(value["oid"], len(self.hub.contents[value["oid"]]), True)
        elif key == "deletedFile":
            if value["path"] not in files:
                raise _Refused(404, "EntryNotFound", "A file with this name doesn't exist")
            del files[value["path"]]

    def _resolve(self, key: str, revision: str, path: str) -> tuple[int, Any, dict[str, str]]:
        repository, commit = self._find(key, revision)
        file = repository.commits[commit].files.get(path)
        if file is None:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(file.size)}
        content = self.hub.contents[file.oid]
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return 200, content, headers
        first, last = int(asked[1]), min(int(asked[2] or file.size - 1), file.size - 1)
        return 206, content[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{file.size}"}


def _reference(kind: str, name: str, commit: str) -> dict[str, str]:
    return {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit}


def _entry(name: str, file: File) -> dict[str, Any]:
    entry = {"type": "file", "path": name, "oid": file.oid[:40], "size": file.size}
    return entry | ({"lfs": {"oid": file.oid, "size": file.size, "pointerSize": 135}} if file.lfs else {})


def _upload_mode(asked: dict[str, Any], files: dict[str, File]) -> dict[str, Any]:
    path, there = asked["path"], files.get(asked["path"])
    large = asked["size"] > LFS_SIZE or path.endswith(LFS_SUFFIXES)
    mode = "lfs" if large else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": there.oid if there else None}


@contextmanager
def serve_hub(token: str = TOKEN) -> Iterator[Hub]:
    """A hub with no repositories, while the block runs."""
    hub = Hub(token)
    hub.start()
    try:
        yield hub
    finally:
        hub.stop()
