"""Uploads a folder to a repository on a hub: one commit with a tag per step. It retries, and sends no file twice.

A commit contains the complete model, so main never has an incomplete one. Each attempt lists the repository's files and
sends only what differs. Large files go first, and stay on the hub if the attempt fails later. Then follows one commit,
which fails if somebody else has committed meanwhile, and then the tag. A step older than main's is committed on a
branch, which is deleted once the tag points to its commit.
"""

import logging
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled, RemoteEntryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.lfs import UploadInfo
from huggingface_hub.utils.sha import git_hash

from data_prep.common.files import read_json
from data_prep.common.retry import Result, backoff, retry
from pipeline.hub import LOG_IN, lacks_xet, quiet_hub, reason, status_of

logger = logging.getLogger(__name__)

MAIN = "main"
STEP_FILE = "training/checkpoint.json"
OURS = ("model*.safetensors", "model.safetensors.index.json", "training/*", "results/*")
"""Files that are deleted from the repository if the folder no longer has them; other files are the user's."""
TRANSIENT = (408, 409, 412, 425, 429)
"""Status codes, besides all from 500 on, that a retry may resolve; 412: somebody else has committed meanwhile."""
MIN_ATTEMPTS = 6
"""Minimum number of attempts before a push fails."""
LONGEST_PAUSE = 60.0
"""Maximum seconds between two attempts, unless the hub asks for more."""


@dataclass(frozen=True)
class Pushed:
    """The result of a push."""

    url: str
    commit: str
    tag: str | None
    on_main: bool
    private: bool
    sent: tuple[str, ...]
    """Files that the commit added or changed."""


def push(folder: Path, repository: str, *, step: int | None, retry_seconds: float, public: bool = False) -> Pushed:
    """Makes the repository ORG/NAME match the folder, with a tag for its step if it has one.

    retry_seconds: how long to retry if the hub is busy or unreachable. public: whether a new repository is public.
    Raises ValueError with one sentence if the retries are exhausted or the hub refuses.
    """
    check_login(repository)
    pushing = Push(HfApi(), folder, repository, step, public)
    with quiet_hub():
        return with_retries(pushing.attempt, repository, retry_seconds)


def check_login(repository: str) -> None:
    """Raises ValueError if there is no token; whether the token is valid, only the hub can check."""
    if get_token() is None:
        raise ValueError(f"Publishing {repository} to {constants.ENDPOINT} requires a token; {LOG_IN}.")


def with_retries(work: Callable[[], Result], what: str, retry_seconds: float) -> Result:
    """The result of `work`, retried after transient errors with randomized exponential backoff."""
    start = time.monotonic()

    def pause_after(error: Exception, failures: int) -> float:
        cause = _cause(error)
        if cause is None:
            raise error
        waited, asked = time.monotonic() - start, _asked_pause(cause)
        pause = max(asked, backoff(failures, first=2.0, longest=LONGEST_PAUSE) * random.uniform(0.5, 1.0))
        exhausted = waited + pause > retry_seconds and (failures >= MIN_ATTEMPTS or asked > retry_seconds)
        if exhausted or not _is_transient(cause):
            spent = f", in {failures} attempts over {waited:.0f} s" if failures > 1 else ""
            raise ValueError(f"{what} was not published: {reason(cause)}{spent}.") from error
        logger.warning(f"{what}: {reason(cause)}; retrying in {pause:.0f} s")
        return pause

    return retry(work, (HTTPError, OSError, RuntimeError, JSONDecodeError), pause_after)


def _cause(error: BaseException) -> BaseException | None:
    """The hub or network error that caused an error; None if there is none."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, HTTPError | ConnectionError | JSONDecodeError):
        found = found.__cause__
    return found


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, OfflineModeIsEnabled) or lacks_xet(error):
        return False
    status = status_of(error)
    return status is None or status in TRANSIENT or status >= 500


def _asked_pause(error: BaseException) -> float:
    """Seconds that the hub asked to wait, by Retry-After."""
    response = getattr(error, "response", None)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    return float(asked) if asked.isdigit() else 0.0


class Push:
    """The upload of one folder to one repository."""

    def __init__(self, api: HfApi, folder: Path, repository: str, step: int | None, public: bool) -> None:
        self.api, self.folder, self.step, self.public = api, folder, step, public
        self.where: dict[str, Any] = {"repo_id": repository}
        self.files = {
            str(path.relative_to(folder)): UploadInfo.from_path(str(path))
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        """Sizes and digests by name, computed once for all attempts."""
        self.sent: dict[str, None] = {}

    def attempt(self) -> Pushed:
        """Brings the repository into the desired state from whatever state an earlier attempt left."""
        url = self.api.create_repo(**self.where, private=not self.public, exist_ok=True)
        refs = self.api.list_repo_refs(**self.where)
        branches = {ref.name: ref.target_commit for ref in refs.branches}
        tags = {ref.name: ref.target_commit for ref in refs.tags}
        tag = f"step-{self.step:08d}" if self.step is not None else None
        on_main = self._is_newest(branches[MAIN])
        if on_main:
            commit = self._commit(MAIN, branches[MAIN])
            self._tag(commit, tag, tags)
        else:
            assert tag is not None
            commit = self._commit_older_step(tag, tags, branches)
        private = bool(self.api.repo_info(**self.where).private)
        return Pushed(str(url), commit, tag, on_main, private, tuple(self.sent))

    def _is_newest(self, head: str) -> bool:
        """Whether main should get this step: not if it has a later one."""
        if self.step is None:
            return True
        with tempfile.TemporaryDirectory() as temporary:
            try:
                path = self.api.hf_hub_download(**self.where, filename=STEP_FILE, revision=head, local_dir=temporary)
            except RemoteEntryNotFoundError:
                return True
            return self.step >= read_json(Path(path))["step"]

    def _commit_older_step(self, tag: str, tags: dict[str, str], branches: dict[str, str]) -> str:
        """Commits a step older than main's on a branch, which is deleted once the tag points to the commit."""
        branch = f"{tag}-incoming"
        commit = tags.get(tag)
        if commit is None or self._differences(commit):
            head = branches.get(branch)
            if head is None:
                head = branches[branch] = commit or branches[MAIN]
                self.api.create_branch(**self.where, branch=branch, revision=head, exist_ok=True)
            commit = self._commit(branch, head)
            self._tag(commit, tag, tags)
        if branch in branches:
            self.api.delete_branch(**self.where, branch=branch)
        return commit

    def _tag(self, commit: str, tag: str | None, tags: dict[str, str]) -> None:
        """Makes the step's tag point to the commit."""
        if tag is None or tags.get(tag) == commit:
            return
        if tag in tags:
            self.api.delete_tag(**self.where, tag=tag)
        self.api.create_tag(**self.where, tag=tag, revision=commit)

    def _commit(self, branch: str, head: str) -> str:
        """Commits the folder to a branch and returns the commit; `head` if nothing differs."""
        operations = self._differences(head)
        if not operations:
            return head
        self.sent |= dict.fromkeys(op.path_in_repo for op in operations if isinstance(op, CommitOperationAdd))
        message = "Publish" if self.step is None else f"Step {self.step:,}"
        return self.api.create_commit(
            **self.where, operations=operations, commit_message=message, revision=branch, parent_commit=head
        ).oid

    def _differences(self, commit: str) -> list[CommitOperationAdd | CommitOperationDelete]:
        """The operations that make a commit's files match the folder."""
        tree = self.api.list_repo_tree(**self.where, recursive=True, revision=commit)
        remote = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
        changed = [name for name in self.files if name not in remote or not self._is_same(name, remote[name])]
        gone = [name for name in remote if name not in self.files and any(fnmatch(name, pattern) for pattern in OURS)]
        return [*map(self._addition, changed), *(CommitOperationDelete(name, is_folder=False) for name in gone)]

    def _is_same(self, name: str, entry: RepoFile) -> bool:
        if entry.size != self.files[name].size:
            return False
        if entry.lfs is not None:
            return entry.lfs.sha256 == self.files[name].sha256.hex()
        return entry.blob_id == git_hash((self.folder / name).read_bytes())

    def _addition(self, name: str) -> CommitOperationAdd:
        addition = CommitOperationAdd(name, self.folder / name)
        addition.upload_info = self.files[name]
        return addition
