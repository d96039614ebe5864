"""Models on a hub: parses their names, downloads them to the local cache, and describes errors in one sentence.

huggingface_hub reads the usual variables: HF_ENDPOINT for a hub other than huggingface.co, HF_TOKEN (or `hf auth
login`) for authentication, HF_HUB_OFFLINE=1 to use the local cache only.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data_prep.common.files import file_sha256

HUB = "hub:"
PULLED = ("*.json", "*.safetensors", "*.bin", "README.md", "training/*", "results/*")
"""Files to download; weights of other frameworks are not needed."""
NAME = re.compile(r"[\w.-]+/[\w.-]+")
LONGEST_SILENCE = 60.0
"""Seconds after which a hub that accepts a connection, or a part of a file, and sends nothing counts as unreachable."""
SHA256, GIT_SHA1 = 64, 40
"""Lengths of digests in hex."""
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def parse_name(name: str) -> tuple[str, str | None]:
    """(ORG/NAME, revision or None) from the text after `hub:`. Raises ValueError if it is not a valid name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    repository, _, revision = name.partition("@")
    with suppress(HFValidationError):
        validate_repo_id(repository)
        if NAME.fullmatch(repository):
            return repository, revision or None
    raise ValueError(
        f"{HUB}{name} is not the name of a model on a hub; it must be {HUB}ORG/NAME or {HUB}ORG/NAME@REVISION."
    )


def check_dataset(name: str | None) -> None:
    """Raises ValueError if `--dataset` is not the name of a dataset on a hub: ORG/NAME, or NAME for old ones."""
    if name is None:
        return
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"--dataset is {name!r}; it must be the name of a dataset on the hub, ORG/NAME.") from error


def pull(name: str) -> Path:
    """The folder of a model in the local cache, downloaded if it is not cached; `name` is the text after `hub:`.

    Raises ValueError if the model or revision does not exist, if it is not cached and the hub can't be reached, or if a
    cached file is damaged.
    """
    from huggingface_hub import snapshot_download

    repository, revision = parse_name(name)
    with quiet_hub(), hub_errors_as_value_errors(f"{HUB}{name}"):
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=list(PULLED)))
    _check_cached(folder, f"{HUB}{name}")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{HUB}{name} has no config.json; it must be a model's repository.")
    return folder


def _check_cached(folder: Path, what: str) -> None:
    """Raises ValueError that names a cached file whose content has changed since its download, or that is missing.

    A file in the cache is a link to a blob whose name is its digest: sha256 in LFS, git's otherwise.
    """
    from huggingface_hub.utils.sha import git_hash

    for file in sorted(folder.rglob("*")):
        if file.is_dir() or not file.is_symlink():  # copies, where the file system has no links, have lost their name
            continue
        if not file.exists():  # its blob was deleted, as after the advice below
            raise ValueError(
                f"{file.relative_to(folder)} of {what} is missing from the cache; run the command with access to the "
                f"hub."
            )
        digest = file.readlink().name
        if not re.fullmatch(r"[0-9a-f]+", digest) or len(digest) not in (SHA256, GIT_SHA1):
            continue
        if digest != (file_sha256(file) if len(digest) == SHA256 else git_hash(file.read_bytes())):
            raise ValueError(
                f"{file.relative_to(folder)} of {what} has changed in the cache since it was downloaded; delete "
                f"{file.resolve()}, and run the command again with access to the hub."
            )


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Hides huggingface_hub's warnings, which may show signed addresses; shows progress bars on terminals only.

    Also limits how long a request waits for the hub (LONGEST_SILENCE).
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    set_client_factory(_impatient_client)
    verbosity, bars = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity_error()
    if bars and not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            enable_progress_bars()


def _impatient_client() -> Any:
    """huggingface_hub's HTTP client, whose requests wait at most LONGEST_SILENCE where it sets no limit itself."""
    from huggingface_hub.utils._http import default_client_factory

    def limit(request: Any) -> None:
        waits = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {kind: wait or LONGEST_SILENCE for kind, wait in waits.items()}

    client = default_client_factory()
    client.event_hooks = {**client.event_hooks, "request": [*client.event_hooks["request"], limit]}
    return client


@contextmanager
def hub_errors_as_value_errors(what: str) -> Iterator[None]:
    """Converts huggingface_hub's errors to ValueErrors of one sentence about `what`, which never contain a token."""
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except LocalEntryNotFoundError as error:
        raise ValueError(f"{what} is not in the cache, and the hub can't be reached ({reason(error)}).") from error
    except OfflineModeIsEnabled as error:
        raise ValueError(f"{what} needs the hub, but HF_HUB_OFFLINE is set.") from error
    except HTTPError as error:
        raise ValueError(f"{what}: {reason(error)}.") from error


def reason(error: BaseException) -> str:
    """Why a call to the hub failed, in a few words."""
    from huggingface_hub import errors
    from huggingface_hub.constants import ENDPOINT

    status = status_of(error)
    if isinstance(error, errors.RevisionNotFoundError):
        return "the revision does not exist"
    if isinstance(error, errors.GatedRepoError):
        return f"{ENDPOINT} restricts access to it; request access there"
    if status == 401 and "Invalid" in str(getattr(error, "server_message", "")):
        return f"{ENDPOINT} refused the token; {LOG_IN}"
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return f"{ENDPOINT} has no such repository, or it is private; {LOG_IN}"
    if status == 403:
        return f"{ENDPOINT} denies this to the token's owner; {LOG_IN} of an account with access"
    if status is not None:
        message = " ".join(str(getattr(error, "server_message", None) or "").split()).rstrip(".")
        return f"{ENDPOINT} answered {status}" + (f" ({message})" if message else "")
    if isinstance(error, errors.LocalEntryNotFoundError):
        return reason(error.__cause__) if error.__cause__ else "HF_HUB_OFFLINE is set"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if lacks_xet(error):
        return f"{ENDPOINT} has no xet storage; set HF_HUB_DISABLE_XET=1"
    return f"{ENDPOINT} did not answer: {type(error).__name__}"


def lacks_xet(error: BaseException) -> bool:
    """Whether huggingface_hub tried to upload to xet storage, and the hub has none."""
    return isinstance(error, ConnectionError) and "xet-write-token" in str(error) and "404" in str(error)


def status_of(error: BaseException) -> int | None:
    """The HTTP status of a hub's error; None if the hub did not answer."""
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)
