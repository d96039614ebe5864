"""A push: what it sends, branches and tags, and faults of the hub."""

import json
import random
from pathlib import Path

import pytest
from huggingface_hub import constants

from pipeline.publish import push as pushing
from pipeline.publish.push import push
from tests.hub_repositories import File, Repository
from tests.hub_server import TOKEN, Hub
from tests.launch import files_of
from tests.pipeline.publish.conftest import REPOSITORY


class Clock:
    """Time that passes only in sleep."""

    def __init__(self) -> None:
        self.now, self.pauses = 0.0, []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A fake clock for push and for huggingface_hub's own retries."""
    clock = Clock()
    monkeypatch.setattr("time.sleep", clock.sleep)
    monkeypatch.setattr(pushing, "time", clock)
    return clock


def check_main_was_always_complete(hub: Hub, repository: str = REPOSITORY) -> None:
    """Every commit of main had a complete model, or none."""
    found = hub.repository(repository)
    name: str | None = found.branches["main"]
    while name is not None:
        commit = found.commits[name]
        if commit.title != "initial commit":
            assert {"config.json", "README.md", "model.safetensors", "preprocessor_config.json"} <= set(commit.files)
        name = commit.parent


def check_content(hub: Hub, folder: Path, revision: str = "main") -> None:
    assert hub.files(REPOSITORY, revision) == files_of(folder) | {".gitattributes": b"*.safetensors filter=lfs\n"}


def test_a_push_makes_a_private_repository_and_a_tag(hub: Hub, models: dict[int, Path]) -> None:
    pushed = push(models[40], REPOSITORY, step=40, retry_seconds=60)
    repository = hub.repository(REPOSITORY)
    assert repository.private
    assert pushed.private
    assert repository.tags == {"step-00000040": repository.branches["main"]}
    assert hub.titles(REPOSITORY) == ["initial commit", "Step 40"]
    check_content(hub, models[40])
    assert push(models[40], "lab/open", step=40, retry_seconds=60, public=True).private is False


def test_a_second_push_sends_nothing(hub: Hub, models: dict[int, Path]) -> None:
    first = push(models[40], REPOSITORY, step=40, retry_seconds=60)
    sent, before = hub.bytes_sent, len(hub.requests)
    second = push(models[40], REPOSITORY, step=40, retry_seconds=60)
    assert (second.commit, second.sent) == (first.commit, ())
    assert hub.bytes_sent == sent > 0
    assert not [request for request in hub.requests[before:] if "commit" in request or "tag" in request]


def test_main_gets_later_steps_only(hub: Hub, models: dict[int, Path]) -> None:
    push(models[20], REPOSITORY, step=20, retry_seconds=60)
    sent = hub.bytes_sent
    push(models[40], REPOSITORY, step=40, retry_seconds=60)
    differing = [name for name, content in files_of(models[40]).items() if files_of(models[20])[name] != content]
    assert hub.bytes_sent - sent == sum(len(files_of(models[40])[name]) for name in differing)
    main = hub.repository(REPOSITORY).branches["main"]

    changed = push(models[20], REPOSITORY, step=20, retry_seconds=60)
    assert (changed.sent, changed.on_main) == ((), False)
    check_content(hub, models[40])
    check_content(hub, models[20], "step-00000020")
    assert hub.repository(REPOSITORY).branches == {"main": main}


def test_an_older_step_published_later(hub: Hub, models: dict[int, Path], tmp_path: Path) -> None:
    push(models[40], REPOSITORY, step=40, retry_seconds=60)
    main = hub.repository(REPOSITORY).branches["main"]
    late = push(models[20], REPOSITORY, step=20, retry_seconds=60)
    assert (late.on_main, late.tag) == (False, "step-00000020")
    assert hub.repository(REPOSITORY).branches == {"main": main}
    check_content(hub, models[20], "step-00000020")
    check_content(hub, models[40])


def test_obsolete_files_are_deleted_and_other_files_stay(hub: Hub, models: dict[int, Path]) -> None:
    push(models[40], REPOSITORY, step=40, retry_seconds=60)
    repository = hub.repository(REPOSITORY)
    stray = File(hub.store(b"?", lfs=False), 1, False)
    head = repository.commits[repository.branches["main"]].files
    added = {"model-00002-of-00002.safetensors": stray, "results/old.json": stray, "NOTES.md": stray}
    hub.commit(repository, "main", "Manual change", head | added)
    push(models[40], REPOSITORY, step=40, retry_seconds=60)
    assert set(hub.files(REPOSITORY)) == set(files_of(models[40])) | {".gitattributes", "NOTES.md"}


FAULTS = {
    "500 at the commit": ("POST", "/commit/", 500, 2, {}),
    "503 at an upload": ("PUT", "/lfs/", 503, 7, {}),
    "429 at the commit": ("POST", "/commit/", 429, 1, {"Retry_After": "20"}),
    "429 at the tag": ("POST", "/tag/", 429, 2, {"Retry_After": "20"}),
    "a broken upload": ("PUT", "/lfs/", "drop", 8, {}),
    "a broken commit": ("POST", "/commit/", "drop", 1, {}),
    "a commit whose answer is lost": ("POST", "/commit/", "lost", 1, {}),
    "a tag whose answer is lost": ("POST", "/tag/", "lost", 1, {}),
    "a repository whose answer is lost": ("POST", "/repos/create", "lost", 1, {}),
    "500 at the list of files": ("GET", "/tree/", 500, 7, {}),
    "500 without JSON at the check of the card": ("POST", "/validate-yaml", 502, 1, {}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_transient_errors_are_retried(
    fault: str,
    hub: Hub,
    models: dict[int, Path],
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    method, path, how, times, headers = FAULTS[fault]
    hub.fail(method, path, how, times, **headers)
    push(models[40], REPOSITORY, step=40, retry_seconds=600)
    assert hub.faults[0].times == 0, "the fault happened"
    repository = hub.repository(REPOSITORY)
    assert repository.tags == {"step-00000040": repository.branches["main"]}
    assert hub.titles(REPOSITORY) == ["initial commit", "Step 40"]
    check_content(hub, models[40])
    assert max(clock.pauses) >= (20 if how == 429 else 0)
    output = caplog.text + "".join(capfd.readouterr())
    assert "retrying in" in output
    assert TOKEN not in output


def test_somebody_commits_meanwhile(hub: Hub, models: dict[int, Path], clock: Clock) -> None:
    push(models[20], REPOSITORY, step=20, retry_seconds=60)

    def interfere(repository: Repository) -> None:
        notes = File(hub.store(b"mine", lfs=False), 4, False)
        head = repository.commits[repository.branches["main"]].files
        hub.commit(repository, "main", "Manual change", head | {"NOTES.md": notes})

    hub.before_commit = interfere
    push(models[40], REPOSITORY, step=40, retry_seconds=60)
    assert hub.titles(REPOSITORY) == ["initial commit", "Step 20", "Manual change", "Step 40"]
    assert hub.files(REPOSITORY)["NOTES.md"] == b"mine"


def test_a_later_step_comes_in_meanwhile(hub: Hub, models: dict[int, Path], clock: Clock) -> None:
    push(models[20], REPOSITORY, step=20, retry_seconds=60)
    hub.before_commit = lambda _repository: push(models[40], REPOSITORY, step=40, retry_seconds=60)
    late = push(models[20], REPOSITORY, step=20, retry_seconds=60)
    assert late.sent == ()
    hub.before_commit = None
    push(models[40], REPOSITORY, step=40, retry_seconds=60)
    check_content(hub, models[40])


def test_a_hub_that_stays_busy_is_one_sentence(hub: Hub, models: dict[int, Path], clock: Clock) -> None:
    hub.fail("POST", "/commit/", 503, 1000)
    random.seed(0)
    with pytest.raises(ValueError, match=r"^lab/image-gpt was not published: .* answered 503 .*, in \d+ attempts over"):
        push(models[40], REPOSITORY, step=40, retry_seconds=600)
    assert 400 < clock.now < 700
    assert hub.titles(REPOSITORY) == ["initial commit"]
    hub.faults.clear()
    before = hub.bytes_sent
    push(models[40], REPOSITORY, step=40, retry_seconds=600)
    weights = (models[40] / "model.safetensors").stat().st_size
    assert hub.bytes_sent - before < weights, "what the hub has is not sent again"
    check_content(hub, models[40])


def test_a_hub_that_asks_to_wait_for_hours_is_an_error(hub: Hub, models: dict[int, Path], clock: Clock) -> None:
    hub.fail("POST", "/commit/", 429, 1000, Retry_After="7200")
    with pytest.raises(ValueError, match="answered 429"):
        push(models[40], REPOSITORY, step=40, retry_seconds=600)
    assert clock.now < 700


@pytest.mark.parametrize("seconds", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_an_unreachable_hub_is_retried(
    seconds: int, hub: Hub, models: dict[int, Path], caplog: pytest.LogCaptureFixture
) -> None:
    push(models[20], REPOSITORY, step=20, retry_seconds=120)
    hub.away(seconds)
    push(models[40], REPOSITORY, step=40, retry_seconds=120)
    check_content(hub, models[40])
    check_main_was_always_complete(hub)
    assert "did not answer" in caplog.text


@pytest.mark.parametrize("token", ["hf_" + "z" * 34, ""])
def test_a_refused_token_is_one_sentence(
    token: str,
    hub: Hub,
    models: dict[int, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"`hf auth login`") as refused:
        push(models[40], REPOSITORY, step=40, retry_seconds=60)
    output = str(refused.value) + caplog.text + "".join(capfd.readouterr())
    assert token == "" or token not in output
    assert not hub.repositories


def test_a_repository_without_write_access_is_one_sentence(hub: Hub, models: dict[int, Path], clock: Clock) -> None:
    hub.fail("POST", "/commit/", 403)
    push_it = lambda: push(models[40], REPOSITORY, step=40, retry_seconds=60)  # noqa: E731
    with pytest.raises(ValueError, match="denies this to the token's owner"):
        push_it()
    assert clock.pauses == []


def test_a_hub_without_xet_is_one_sentence(hub: Hub, models: dict[int, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(ValueError, match="has no xet storage; set HF_HUB_DISABLE_XET=1"):
        push(models[40], REPOSITORY, step=40, retry_seconds=60)


def test_a_card_that_the_hub_rejects(hub: Hub, models: dict[int, Path], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nmodel-index: [nonsense]\n---\n")
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
        push(tmp_path, REPOSITORY, step=None, retry_seconds=60)


def test_a_push_that_fails_between_commit_and_tag(hub: Hub, models: dict[int, Path], clock: Clock) -> None:
    for step in (40, 20):  # on main, and on a branch
        hub.fail("POST", "/tag/", 400)
        with pytest.raises(ValueError, match="answered 400"):
            push(models[step], REPOSITORY, step=step, retry_seconds=60)
        before = hub.bytes_sent
        push(models[step], REPOSITORY, step=step, retry_seconds=60)
        assert hub.bytes_sent == before
        check_content(hub, models[step], f"step-{step:08d}")
    assert list(hub.repository(REPOSITORY).branches) == ["main"]
    assert json.loads(hub.files(REPOSITORY)["training/checkpoint.json"])["step"] == 40
