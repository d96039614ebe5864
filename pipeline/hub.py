"""Models on a hub: their names, their copies in the local cache, and what can go wrong, as one sentence.

HF_ENDPOINT names another hub than huggingface.co, HF_TOKEN or `hf auth login` says who asks, HF_HUB_OFFLINE=1 keeps to
the cache: all of it is huggingface_hub's own.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

HUB = "hub:"
PULLED = ("*.json", "*.safetensors", "*.bin", "README.md", "training/*", "results/*")
"""What a model is read from; other frameworks' weights stay where they are."""
NAME = re.compile(r"[\w.-]+/[\w.-]+")
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def parse_name(name: str) -> tuple[str, str | None]:
    """(ORG/NAME, revision or None) of what follows `hub:`. Raises ValueError if it is no such name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    repository, _, revision = name.partition("@")
    with suppress(HFValidationError):
        validate_repo_id(repository)
        if NAME.fullmatch(repository):
            return repository, revision or None
    raise ValueError(f"{HUB}{name} is no name of a model on a hub; it must be {HUB}ORG/NAME or {HUB}ORG/NAME@REVISION.")


def pull(name: str) -> Path:
    """The folder of a model in the local cache, fetched if it is not there; `name` follows `hub:`.

    Raises ValueError, one sentence, if there is no such model or revision, or it can't be reached and is not cached.
    """
    from huggingface_hub import snapshot_download

    repository, revision = parse_name(name)
    with quiet_hub(), sentences(f"{HUB}{name}"):
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=list(PULLED)))
    if not (folder / "config.json").is_file():
        raise ValueError(f"{HUB}{name} has no config.json; it must be a model's repository.")
    return folder


@contextmanager
def quiet_hub() -> Iterator[None]:
    """No warnings of huggingface_hub, since they show addresses that can be signed; bars on a terminal only."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

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


@contextmanager
def sentences(what: str) -> Iterator[None]:
    """Raises what huggingface_hub raises as ValueError with one sentence about `what`; it never holds a token."""
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
        return "there is no such revision"
    if isinstance(error, errors.GatedRepoError):
        return f"{ENDPOINT} lets only some people read it; ask there for access"
    if status == 401 and "Invalid" in str(getattr(error, "server_message", "")):
        return f"{ENDPOINT} refused the token; {LOG_IN}"
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return f"{ENDPOINT} has no such repository, or shows it to others only; {LOG_IN}"
    if status == 403:
        return f"{ENDPOINT} does not allow this to the token's owner; {LOG_IN} of one who may"
    if status is not None:
        message = " ".join(str(getattr(error, "server_message", None) or "").split()).rstrip(".")
        return f"{ENDPOINT} answered {status}" + (f" ({message})" if message else "")
    if isinstance(error, errors.LocalEntryNotFoundError):
        return reason(error.__cause__) if error.__cause__ else "HF_HUB_OFFLINE is set"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if lacks_xet(error):
        return f"{ENDPOINT} has no xet storage; set HF_HUB_DISABLE_XET=1"
    return f"{ENDPOINT} gave no answer: {type(error).__name__}"


def lacks_xet(error: BaseException) -> bool:
    """Whether huggingface_hub wanted to upload by xet, and the hub knows no such thing."""
    return isinstance(error, ConnectionError) and "xet-write-token" in str(error) and "404" in str(error)


def status_of(error: BaseException) -> int | None:
    """The HTTP status that a hub's error carries; None if no answer came."""
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)
