"""A folder to a repository on a hub: one commit a step, with a tag; retried, and not sent twice.

A commit holds the whole model, so main never holds half of one. Each attempt reads anew what the repository has and
sends what differs: large files first, which stay on the hub if the attempt fails later, then the one commit, on the
condition that nobody has committed since, then the tag. An older step than main's goes to a branch, which is deleted
once the tag holds its commit.
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
"""What is deleted from a repository if the folder has it no more; other files there are somebody's."""
PASSING = (408, 409, 412, 425, 429)
"""Status codes that another attempt may mend, besides all from 500 on; 412: somebody has committed meanwhile."""
ATTEMPTS = 6
"""At least so many, before a push is given up."""
LONGEST_PAUSE = 60.0
"""Seconds between two attempts, unless the hub asks for more."""


@dataclass(frozen=True)
class Pushed:
    """What came of a push."""

    url: str
    commit: str
    tag: str | None
    on_main: bool
    private: bool
    sent: tuple[str, ...]
    """Files of the commit that were not there before."""


def push(folder: Path, repository: str, *, step: int | None, patience: float, public: bool = False) -> Pushed:
    """Makes the repository ORG/NAME hold what the folder holds, with a tag for its step if it has one.

    patience: seconds after which a hub that stays away or busy is given up. public: who sees a repository that is made.
    Raises ValueError, one sentence, if it is,
    or if the hub refuses.
    """
    check_login(repository)
    pushing = Push(HfApi(), folder, repository, step, public)
    with quiet_hub():
        return persistently(pushing.attempt, repository, patience)


def check_login(repository: str) -> None:
    """Raises ValueError if there is no token at all; whether it is a good one, the hub will say."""
    if get_token() is None:
        raise ValueError(f"{constants.ENDPOINT} wants to know who publishes {repository}; {LOG_IN}.")


def persistently(work: Callable[[], Result], what: str, patience: float) -> Result:
    """The result of `work`, tried again after what may pass, with pauses that double and vary."""
    began = time.monotonic()

    def pause_after(error: Exception, failures: int) -> float:
        cause = _cause(error)
        if cause is None:
            raise error
        waited, asked = time.monotonic() - began, _asked_pause(cause)
        pause = max(asked, backoff(failures, first=2.0, longest=LONGEST_PAUSE) * random.uniform(0.5, 1.0))
        enough = waited + pause > patience and (failures >= ATTEMPTS or asked > patience)
        if enough or not _may_pass(cause):
            spent = f", in {failures} attempts over {waited:.0f} s" if failures > 1 else ""
            raise ValueError(f"{what} was not published: {reason(cause)}{spent}.") from error
        logger.warning(f"{what}: {reason(cause)}; trying again in {pause:.0f} s")
        return pause

    return retry(work, (HTTPError, OSError, RuntimeError, JSONDecodeError), pause_after)


def _cause(error: BaseException) -> BaseException | None:
    """The hub's or the network's error behind an error, or None if it is of another kind."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, HTTPError | ConnectionError | JSONDecodeError):
        found = found.__cause__
    return found


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, OfflineModeIsEnabled) or lacks_xet(error):
        return False
    status = status_of(error)
    return status is None or status in PASSING or status >= 500


def _asked_pause(error: BaseException) -> float:
    """Seconds that the hub asked to wait."""
    response = getattr(error, "response", None)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    return float(asked) if asked.isdigit() else 0.0


class Push:
    """One folder on its way to one repository."""

    def __init__(self, api: HfApi, folder: Path, repository: str, step: int | None, public: bool) -> None:
        self.api, self.folder, self.step, self.public = api, folder, step, public
        self.where: dict[str, Any] = {"repo_id": repository}
        self.files = {
            str(path.relative_to(folder)): UploadInfo.from_path(str(path))
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        """Sizes and digests by name; a large file is read once for them, however many attempts there are."""
        self.sent: dict[str, None] = {}

    def attempt(self) -> Pushed:
        """Brings the repository to where it should be, from wherever an earlier attempt left it."""
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
            commit = self._commit_aside(tag, tags, branches)
        private = bool(self.api.repo_info(**self.where).private)
        return Pushed(str(url), commit, tag, on_main, private, tuple(self.sent))

    def _is_newest(self, head: str) -> bool:
        """Whether main should hold this step: not if it holds a later one."""
        if self.step is None:
            return True
        with tempfile.TemporaryDirectory() as aside:
            try:
                path = self.api.hf_hub_download(**self.where, filename=STEP_FILE, revision=head, local_dir=aside)
            except RemoteEntryNotFoundError:
                return True
            return self.step >= read_json(Path(path))["step"]

    def _commit_aside(self, tag: str, tags: dict[str, str], branches: dict[str, str]) -> str:
        """The commit of a step that is not main's, made on a branch that is deleted once the tag holds the commit."""
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
        """Lets the step's tag name the commit."""
        if tag is None or tags.get(tag) == commit:
            return
        if tag in tags:
            self.api.delete_tag(**self.where, tag=tag)
        self.api.create_tag(**self.where, tag=tag, revision=commit)

    def _commit(self, branch: str, head: str) -> str:
        """The commit on a branch that holds the folder: `head` if it does already."""
        operations = self._differences(head)
        if not operations:
            return head
        self.sent |= dict.fromkeys(op.path_in_repo for op in operations if isinstance(op, CommitOperationAdd))
        message = "Publish" if self.step is None else f"Step {self.step:,}"
        return self.api.create_commit(
            **self.where, operations=operations, commit_message=message, revision=branch, parent_commit=head
        ).oid

    def _differences(self, commit: str) -> list[CommitOperationAdd | CommitOperationDelete]:
        """What would make a commit's files those of the folder."""
        tree = self.api.list_repo_tree(**self.where, recursive=True, revision=commit)
        there = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
        changed = [name for name in self.files if name not in there or not self._is_same(name, there[name])]
        gone = [name for name in there if name not in self.files and any(fnmatch(name, pattern) for pattern in OURS)]
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
