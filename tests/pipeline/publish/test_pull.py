"""Models that are read from a hub: the cache, wrong names, a hub that does not answer."""

import socket
from pathlib import Path

import pytest
from huggingface_hub import constants

from data_prep.common.files import read_json
from pipeline.command_line import parse_training
from pipeline.hub import _check_cached
from pipeline.model_folder.export import find_checkpoint
from pipeline.model_folder.resolve import model_folder
from pipeline.training_set import open_training_sets
from pipeline.weights.model_files import model_digest
from pipeline.weights.start import check_start
from tests.hub_server import Hub
from tests.pipeline.conftest import Runner
from tests.pipeline.publish.conftest import REPOSITORY, TO_HUB, environment, publish


def test_offline_the_cache_answers(hub: Hub, models: dict[int, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    publish(models[40], *TO_HUB)
    fetched = model_folder(Path(f"hub:{REPOSITORY}"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert model_folder(Path(f"hub:{REPOSITORY}")) == fetched
    with pytest.raises(ValueError, match=r"hub:lab/other is not in the cache, and the hub can't be reached"):
        model_folder(Path("hub:lab/other"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lab/none", "has no such repository, or it is private"),
        (f"{REPOSITORY}@step-00000007", "the revision does not exist"),
        ("image-gpt", "must be hub:ORG/NAME or hub:ORG/NAME@REVISION"),
        ("a/b/c", "must be hub:ORG/NAME or hub:ORG/NAME@REVISION"),
    ],
)
def test_unknown_and_invalid_names(name: str, message: str, hub: Hub, models: dict[int, Path]) -> None:
    publish(models[40], *TO_HUB)
    with pytest.raises(ValueError, match=message):
        model_folder(Path(f"hub:{name}"))


def cached(name: str, folder: Path) -> Path:
    """The file in huggingface_hub's cache to which a file of a pulled model is a link."""
    [blob] = [file.resolve() for file in folder.rglob(name)]
    return blob


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_changed_file_in_the_cache_is_named(
    name: str, hub: Hub, models: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(models[40], *TO_HUB)
    folder = model_folder(Path(f"hub:{REPOSITORY}"))
    blob = cached(name, folder)
    right = blob.read_bytes()
    blob.write_bytes(right[:300] + bytes([right[300] ^ 1]) + right[301:])
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        with pytest.raises(ValueError, match=f"{name} of hub:{REPOSITORY} has changed in the cache .*; delete {blob}"):
            model_folder(Path(f"hub:{REPOSITORY}"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    blob.unlink()
    assert (model_folder(Path(f"hub:{REPOSITORY}")) / name).read_bytes() == right


def test_a_deleted_file_in_the_cache_is_named(tmp_path: Path) -> None:
    """A cache without a list of the repository's files, which huggingface_hub then does not check offline."""
    (tmp_path / "model.safetensors").symlink_to(tmp_path / ("0" * 64))
    with pytest.raises(ValueError, match="of hub:a/b is missing from the cache; run the command with access"):
        _check_cached(tmp_path, "hub:a/b")


@pytest.mark.parametrize("to_hub", [True, False])
def test_a_hub_that_never_answers_is_one_sentence(
    to_hub: bool, hub: Hub, models: dict[int, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It accepts connections, as a hub whose machines are overloaded."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr("pipeline.hub.LONGEST_SILENCE", 0.2)
        monkeypatch.setattr("pipeline.publish.push.MIN_ATTEMPTS", 2)
        message = "did not answer: ReadTimeout, in 2 attempts over" if to_hub else "did not answer: ReadTimeout"
        with pytest.raises(ValueError, match=message):
            if to_hub:
                publish(models[40], *TO_HUB, "--retry_minutes", "0")
            else:
                model_folder(Path(f"hub:{REPOSITORY}"))
    assert ("retrying in" in caplog.text) == to_hub


def test_a_run_starts_from_a_hub(hub: Hub, models: dict[int, Path], shards: Path, tmp_path: Path) -> None:
    """On the login node the model is downloaded; before the ranks meet only its name is checked."""
    publish(models[40], *TO_HUB)
    arguments = Runner(shards, tmp_path).arguments("run", start__path=f"hub:{REPOSITORY}")
    config, run = parse_training(arguments[3:])
    assert check_start(config, open_training_sets(config), run) is None
    assert not any("config.json" in request for request in hub.requests)
    origin = check_start(config, open_training_sets(config), run, download=True)
    assert origin is not None
    facts = origin.facts(origin.digest())
    assert (facts["path"], facts["step"]) == (f"hub:{REPOSITORY}", 40)
    assert facts["digest"] == model_digest(models[40])


@pytest.mark.slow
def test_ranks_start_from_a_hub(
    hub: Hub,
    finished_run: Runner,
    models: dict[int, Path],
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publish(models[40], *TO_HUB)
    for name, value in environment(hub, tmp_path).items():
        monkeypatch.setenv(name, value)
    runner = Runner(shards, tmp_path)
    path = f"hub:{REPOSITORY}"
    finished = runner.train("run", 2, start__path=path, batch__micro_size=2, schedule__steps=5, parallel__zero_stage=3)
    assert finished.codes == [0, 0], "\n".join(finished.outputs)
    assert "(step 40), sha256 " in finished.output
    origin = read_json(runner.folder / "run/run.json")["origin"]
    assert origin["path"] == path
    published = find_checkpoint(finished_run.folder / "reference", 40).record
    assert origin["probe_loss"] == pytest.approx(published.probe_loss, abs=1e-5)
