"""`python -m pipeline publish` from a run to a folder and to a hub, and back from there."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from safetensors.torch import load_file, save_file
from transformers import ImageGPTForCausalImageModeling

from pipeline.evaluate.command import evaluate
from pipeline.evaluate.registry import TASKS, task_class
from pipeline.model_folder.convert import load_model_folder
from pipeline.model_folder.resolve import model_folder
from pipeline.publish.push import Pushed
from tests.hub_server import TOKEN, Hub
from tests.launch import files_of
from tests.pipeline.conftest import Runner
from tests.pipeline.publish.conftest import REPOSITORY, TO_HUB, environment, publish

TASKS_OF_THE_HUB = ("unconditional-image-generation", "image-feature-extraction")
"""Those of huggingface.co/tasks that fit models of images."""
TOPOLOGIES = {"ZeRO-3": {"parallel__zero_stage": 3}, "two stages": {"parallel__pipeline_stages": 2}}
NULLABLE = ("loss", "grad_norm", "valid_loss", "images_per_second", "tokens_per_second", "mfu")
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json")


def logits(folder: Path | str, **options: str) -> torch.Tensor:
    tokens = torch.randint(512, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return ImageGPTForCausalImageModeling.from_pretrained(folder, **options)(input_ids=tokens).logits


def card_code(card: bytes) -> str:
    found = re.search(r"```python\n(.*?)```", card.decode(), re.S)
    assert found is not None
    return found[1]


# To a hub


def test_published_pulled_and_measured_from_the_hub(
    hub: Hub,
    models: dict[int, Path],
    results: Path,
    shards: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    publish(models[20], *TO_HUB)
    publish(models[40], "--results", results, *TO_HUB)
    sent = hub.bytes_sent
    publish(models[40], "--results", results, *TO_HUB)
    assert hub.bytes_sent == sent
    assert re.search(r"step-00000040: nothing to send; the repository is private", caplog.text)
    assert set(hub.repository(REPOSITORY).tags) == {"step-00000020", "step-00000040"}
    assert {"results/density.json", "results/completions.png"} <= set(hub.files(REPOSITORY))
    assert "results/density.json" not in hub.files(REPOSITORY, "step-00000020")

    for name, step in ((f"hub:{REPOSITORY}", 40), (f"hub:{REPOSITORY}@step-00000020", 20)):
        pulled = model_folder(Path(name))
        torch.testing.assert_close(logits(pulled), logits(models[step]), atol=0, rtol=0)
    arguments = [f"hub:{REPOSITORY}", f"--shards={shards}", "--tasks=density", "--test_images=20"]
    assert evaluate([*arguments, f"--out={tmp_path / 'again'}"]) == 0
    here, there = (json.loads((folder / "density.json").read_text()) for folder in (results, tmp_path / "again"))
    assert here["nats_per_color"] == there["nats_per_color"]
    assert here["model_digest"] == there["model_digest"]
    assert TOKEN not in caplog.text + "".join(capfd.readouterr())


@pytest.mark.parametrize("option", [["--retry_minutes", "2"], ["--patience", "2"], ["--patience=2"]])
def test_retry_minutes_and_its_earlier_spelling(
    option: list[str], hub: Hub, models: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pushes: list[float] = []

    def record(*_: object, retry_seconds: float, **__: object) -> Pushed:
        pushes.append(retry_seconds)
        return Pushed(hub.url, "0" * 40, None, True, True, ())

    monkeypatch.setattr("pipeline.publish.push.push", record)
    publish(models[40], *TO_HUB, *option)
    assert pushes == [120]


def test_the_cards_code_runs_without_this_project(hub: Hub, models: dict[int, Path], tmp_path: Path) -> None:
    """A separate process with transformers and the hub, without this project."""
    publish(models[40], *TO_HUB, "--public")
    code = card_code(hub.files(REPOSITORY)["README.md"])
    code += 'import numpy; numpy.save("tokens.npy", tokens.numpy()); torch.save(model.state_dict(), "weights.pt")\n'
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=variables | environment(hub, tmp_path),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    from PIL import Image

    assert Image.open(tmp_path / "sample.png").size == (8, 8)
    loaded = torch.load(tmp_path / "weights.pt", weights_only=True)
    mine = ImageGPTForCausalImageModeling.from_pretrained(models[40]).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in mine.items())


# The card


def test_the_hub_accepts_the_metadata(hub: Hub, models: dict[int, Path], results: Path) -> None:
    publish(models[40], "--results", results, *TO_HUB, "--license", "mit", "--dataset", "lab/photographs")
    card = ModelCard(hub.files(REPOSITORY)["README.md"].decode())
    card.validate()
    assert card.data.pipeline_tag in TASKS_OF_THE_HUB
    assert (card.data.license, card.data.datasets) == ("mit", ["lab/photographs"])
    density = json.loads((results / "density.json").read_text())
    name, found = model_index_to_eval_results(card.data.to_dict()["model-index"])
    values = {result.metric_type: result.metric_value for result in found}
    assert name == "image-gpt"
    assert values["nats_per_color"] == density["nats_per_color"]
    assert {result.dataset_name for result in found} == {"photographs"}


def test_the_card_states_an_unfinished_training_at_its_head(models: dict[int, Path]) -> None:
    words = "**Its training was not finished: step 20 of 40.**"
    head = (models[20] / "README.md").read_text().partition("## ")[0]
    assert words in head
    assert "not finished" not in (models[40] / "README.md").read_text()


def test_the_card_describes_training_and_results(models: dict[int, Path], results: Path, tmp_path: Path) -> None:
    publish(models[40], "--results", results, "--to", f"dir:{tmp_path / 'model'}")
    card = (tmp_path / "model/README.md").read_text()
    density = json.loads((results / "density.json").read_text())
    for words in (
        "Image GPT, step 40",
        "| Images seen | 320 |",
        "| Hardware | 2 ranks on CPU",
        "| Layout | ZeRO-1 |",
        "59,584 parameters",
        f"| photographs | Nats per color | test | {density['nats_per_color']:.4f} |",
        f"| photographs | **this model: Nats per color** | {density['nats_per_color']:.4f} | measured |",
        "| ImageNet 32x32 | iGPT-L (1.4B) | 2.0466 |",
        "## Limits and biases",
        "## License",
    ):
        assert words in card, words
    for path in re.findall(r"\]\((results/[^)]*)\)", card):
        assert (tmp_path / "model" / path).is_file(), path


# To a folder


def test_a_folder_has_the_files_of_a_repository(
    hub: Hub, models: dict[int, Path], results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(models[40], "--results", results, "--to", f"dir:{tmp_path / 'image-gpt'}", "--license", "mit")
    publish("--from", f"dir:{tmp_path / 'image-gpt'}", *TO_HUB)
    there, here = hub.files(REPOSITORY), files_of(tmp_path / "image-gpt")
    cards = {there.pop("README.md"), here.pop("README.md").replace(b'"image-gpt"', f'"{REPOSITORY}"'.encode())}
    there.pop(".gitattributes")
    assert there == here
    assert len(cards) == 1, "the same card except for the name of the model"
    events = EventFile(tmp_path / "image-gpt/training/tensorboard")
    assert events.steps("train/loss") == list(range(1, 41))
    monkeypatch.chdir(tmp_path)
    exec(card_code((tmp_path / "image-gpt/README.md").read_bytes()), {})
    assert (tmp_path / "sample.png").is_file()


def test_results_of_an_earlier_version_have_the_same_card(
    models: dict[int, Path], results: Path, tmp_path: Path
) -> None:
    """Without title, summary and headlines in the tasks' JSON."""
    folder = Path(shutil.copytree(results, tmp_path / "results"))
    density = json.loads((folder / "density.json").read_text())
    provenance = {
        key: density[key] for key in ("model_digest", "dataset", "dataset_digest", "command", "inputs_digest")
    }
    numbers = {"test_accuracy": 0.5, "test_accuracy_deviation": 0.01, "best_layer": 2, "best_k": 20}
    few = {"settings": [{"name": "4 per class", "test_accuracy": 0.25}], "student": {"test_accuracy": 0.75}}
    distance = {"completions": 0.5, "originals": 0.25, "shuffled_lower_halves": 1.0}
    measured = {name: provenance | numbers | few for name in TASKS if TASKS[name].options is not None}
    measured |= {"density": density, "completions": provenance | {"distance": distance}}
    for earlier in (False, True):
        for name, result in measured.items():
            task = task_class(name)
            shown = {"title": task.title, "headlines": [asdict(headline) for headline in task.headlines(result)]}
            other = {key: value for key, value in result.items() if key not in ("title", "summary", "headlines")}
            (folder / f"{name}.json").write_text(json.dumps({"task": name} | other | ({} if earlier else shown)))
        publish(models[40], "--results", folder, "--to", f"dir:{tmp_path / str(earlier) / 'model'}")
    card, earlier_card = ((tmp_path / each / "model/README.md").read_text() for each in ("False", "True"))
    assert all(words in card for words in ("k-NN", "Fréchet", "floor 0.250", "Nats per color", "96.3 %", "MixMatch"))
    assert earlier_card == card


def test_a_training_with_null_losses_is_published(models: dict[int, Path], tmp_path: Path) -> None:
    """metrics.jsonl has null for NaN and Inf; if no loss is finite, there is no curve."""
    model = Path(shutil.copytree(models[40], tmp_path / "model"))
    rows = [json.loads(line) for line in (model / "training/metrics.jsonl").read_text().splitlines()]
    nulls = [row | {key: None for key in row if key in NULLABLE} for row in rows]
    for name, mixed, curve in (("some", nulls[:30] + rows[30:], True), ("all", nulls, False)):
        (model / "training/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mixed))
        publish(model, "--to", f"dir:{tmp_path / name}")
        assert (tmp_path / name / "results/training.png").is_file() == curve
        assert ("| Last training loss |" in (tmp_path / name / "README.md").read_text()) == curve


class EventFile:
    """TensorBoard's own reader."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        self.events = EventAccumulator(str(folder)).Reload()

    def steps(self, tag: str) -> list[int]:
        return [scalar.step for scalar in self.events.Scalars(tag)]


def test_another_publication_replaces_everything(models: dict[int, Path], results: Path, tmp_path: Path) -> None:
    target = tmp_path / "model"
    publish(models[20], "--to", f"dir:{target}")
    publish(models[40], "--results", results, "--to", f"dir:{target}")
    assert (target / "results/density.json").is_file()
    publish(models[40], "--to", f"dir:{target}")
    assert [path.name for path in (target / "results").iterdir()] == ["training.png"]
    before = files_of(target)
    with pytest.raises(ValueError, match="has step 40; give another folder for step 20"):
        publish(models[20], "--to", f"dir:{target}")
    assert files_of(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_publication_leaves_the_earlier_one(
    models: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    publish(models[20], "--to", f"dir:{target}")
    before = files_of(target)
    monkeypatch.setattr(shutil, "copyfile", _full_disk)
    with pytest.raises(OSError, match="No space left"):
        publish(models[40], "--to", f"dir:{target}")
    assert files_of(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def _full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_file_system_that_cannot_swap_names(
    models: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda *_arguments, **_options: object())
    for step in (20, 40):
        publish(models[step], "--to", f"dir:{tmp_path / 'model'}")
    assert load_model_folder(tmp_path / "model").resolution == 8
    assert json.loads((tmp_path / "model/training/checkpoint.json").read_text())["step"] == 40
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# From any topology


@pytest.mark.slow
def test_the_same_repository_from_any_topology(finished_run: Runner, runner: Runner, tmp_path: Path) -> None:
    """A last step at learning rate zero changes no weight, so two topologies must publish the same repository."""
    for name, layout in TOPOLOGIES.items():
        shutil.copytree(finished_run.folder / "reference", runner.folder / name)
        runner.check_trains(name, 2, schedule__steps=41, batch__micro_size=2, **layout)
    step = "checkpoints/step-00000041"
    zero, stages = (runner.folder / name for name in TOPOLOGIES)
    for path in (zero, stages):
        publish_run(path, tmp_path / path.name / "model")
    first, second = (files_of(tmp_path / name / "model") for name in TOPOLOGIES)
    assert first.keys() == second.keys()
    assert [name for name in MODEL_FILES if first[name] != second[name]] == []

    shutil.rmtree(zero / step)
    shutil.rmtree(zero / "exported")
    shutil.copytree(stages / step, zero / step)
    publish_run(zero, tmp_path / "one record/model")
    third = files_of(tmp_path / "one record/model")
    assert [name for name in first if first[name] != third[name]] == [], "the same except for the record of the run"
    assert first.keys() == third.keys()


def publish_run(path: Path, target: Path) -> None:
    publish(path, "--to", f"dir:{target}")


# Invalid input


def test_results_of_another_model(models: dict[int, Path], results: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has completions of the model \w{12}, but .*step-20 is \w{12}"):
        publish(models[20], "--results", results, "--to", f"dir:{tmp_path / 'model'}")
    with pytest.raises(ValueError, match="has no results; give a folder"):
        publish(models[20], "--results", models[40], "--to", f"dir:{tmp_path / 'model'}")
    assert list(tmp_path.iterdir()) == []


def test_an_incomplete_model(hub: Hub, models: dict[int, Path], tmp_path: Path) -> None:
    broken = Path(shutil.copytree(models[40], tmp_path / "broken"))
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors can't be read"):
        publish(broken, *TO_HUB)
    tensors = load_file(models[40] / "model.safetensors")
    tensors["transformer.wpe.weight"][63, 0] = torch.nan
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(ValueError, match=r"NaN or Inf in 1 of 2,048 values of transformer\.wpe\.weight"):
        publish(broken, *TO_HUB)
    (broken / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        publish(broken, *TO_HUB)
    assert not hub.repositories


def test_invalid_input_is_one_sentence(models: dict[int, Path], tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_text("meow")
    target = f"dir:{tmp_path / 'model'}"
    for arguments, message in (
        ((models[40], "--to", target, "--license", "MIT"), "--license is 'MIT', .* identifier such as mit, or other"),
        ((models[40], "--to", target, "--license", "apache2"), "identifier such as apache-2.0"),
        ((models[40], "--to", target, "--dataset", "lab/my photos"), "--dataset is 'lab/my photos'; it must be"),
        ((models[40], "--to", tmp_path), "it must be hub:ORG/NAME or dir:PATH"),
        ((models[40], "--to", f"dir:{tmp_path / 'photos'}"), "has other files"),
        ((models[40], "--to", f"dir:{models[40]}"), "which is the model folder itself"),
        ((models[40], "--to", "hub:lab/model@main"), "remove the revision"),
        (("--to", f"dir:{tmp_path / 'x'}"), "Give exactly one model"),
    ):
        with pytest.raises(ValueError, match=message):
            publish(*arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
