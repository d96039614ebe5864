"""A hub on this machine, and the finished run's model at two steps."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from pipeline.evaluate.command import evaluate
from pipeline.model_folder.export import export, find_checkpoint
from pipeline.publish.command import publish_command
from tests.hub_server import TOKEN, Hub, serve_hub
from tests.pipeline.conftest import Runner
from tests.pipeline.evaluate.conftest import log_level  # noqa: F401

REPOSITORY = "lab/image-gpt"
TO_HUB = ("--to", f"hub:{REPOSITORY}")


def publish(*arguments: object) -> None:
    assert publish_command([str(argument) for argument in arguments]) == 0


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """huggingface_hub talks to it, with a good token and a cache of the test's own."""
    with serve_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def environment(hub: Hub, folder: Path) -> dict[str, str]:
    """What a process needs to find the hub."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(folder / "home"),
    }


@pytest.fixture(scope="session")
def models(finished_run: Runner, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Model folders of the steps 20 and 40; tests only read them."""
    folder = tmp_path_factory.mktemp("models")
    for step in (20, 40):
        export(find_checkpoint(finished_run.folder / "reference", step), folder / f"step-{step}")
    return {step: folder / f"step-{step}" for step in (20, 40)}


@pytest.fixture(scope="session")
def results(models: dict[int, Path], shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of `evaluate` for step 40; tests only read them."""
    folder = tmp_path_factory.mktemp("measured") / "results"
    sizes = ["--completions.images=2", "--completions.samples=1", "--completions.distance_images=0", "--test_images=20"]
    arguments = [str(models[40]), f"--shards={shards}", f"--out={folder}", "--tasks=density,completions"]
    assert evaluate([*arguments, *sizes]) == 0
    return folder
