"""A hub on this machine, and the finished run's model at two steps."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from pipeline.model_folder.export import export, find_checkpoint
from tests.hub_server import TOKEN, Hub, serve_hub
from tests.pipeline.conftest import Runner
from tests.pipeline.evaluate.conftest import log_level  # noqa: F401

REPOSITORY = "lab/image-gpt"


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
