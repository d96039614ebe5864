"""A run's checkpoint as a Hugging Face folder: the same weights from any topology, read by transformers."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel, ImageGPTForCausalImageModeling

from data_prep.shards.reader import open_shard_set
from pipeline.checkpoint.format import open_checkpoint
from pipeline.model.gpt import build_model
from pipeline.model_folder import lazy_weights
from pipeline.model_folder.command import export_command
from pipeline.model_folder.convert import load_model_folder
from pipeline.model_folder.export import CheckpointWeights, export, find_checkpoint
from pipeline.model_folder.resolve import model_folder
from pipeline.train.validation import spread
from tests.launch import run
from tests.pipeline.conftest import Runner


def nats_by_transformers(folder: Path, shards: Path, images: int) -> float:
    """The validation loss of an exported igpt folder, by transformers' class and torch's cross-entropy alone."""
    split = open_shard_set(shards).split("valid")
    tokens = torch.from_numpy(split.gather(spread(split.images, images))[0].astype(np.int64))
    model = ImageGPTForCausalImageModeling.from_pretrained(folder)
    inputs = torch.cat([torch.full((len(tokens), 1), 512), tokens[:, :-1]], dim=1)
    with torch.no_grad():
        logits = model(input_ids=inputs).logits
    return float(torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens))


def test_transformers_reproduces_the_runs_last_validation_loss(
    finished_run: Runner, shards: Path, tmp_path: Path
) -> None:
    source, out = finished_run.folder / "reference", tmp_path / "model"
    finished = run(1, "-m", "pipeline", "export", source, "--out", out, logs=tmp_path)
    assert finished.codes == [0], finished.output
    last = [row for row in finished_run.rows("reference") if "valid_loss" in row][-1]
    assert last["step"] == 40
    assert nats_by_transformers(out, shards, images=33) == pytest.approx(last["valid_loss"], abs=1e-5)
    facts = json.loads((out / "training/checkpoint.json").read_text())
    assert (facts["step"], facts["images"]) == (40, 320)


def test_stages_and_ranks_export_the_same_weights(finished_run: Runner, runner: Runner, tmp_path: Path) -> None:
    assert set(runner.train("run", 2, parallel__zero_stage=3, batch__micro_size=2).codes) == {0}
    folders = []
    for number, path in enumerate((finished_run.folder / "reference", runner.folder / "run")):
        folders.append(tmp_path / f"model-{number}")
        export(find_checkpoint(path), folders[-1])
    first, second = (load_file(folder / "model.safetensors") for folder in folders)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], atol=2e-4, rtol=0)


def test_an_older_step_and_the_checkpoint_itself(finished_run: Runner, tmp_path: Path) -> None:
    source = finished_run.folder / "reference"
    export(find_checkpoint(source, 20), tmp_path / "by-step")
    export(find_checkpoint(source / "checkpoints/step-00000020"), tmp_path / "by-folder")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("by-step", "by-folder"))
    assert first == second
    with pytest.raises(ValueError, match=r"--step has 7, .*of this step; it has 20, 30, 40"):
        find_checkpoint(source, 7)


def test_the_average_of_checkpoints_is_numpys_mean(finished_run: Runner, tmp_path: Path) -> None:
    source, steps = finished_run.folder / "reference", (20, 30, 40)
    for step in steps:
        export(find_checkpoint(source, step), tmp_path / str(step))
    each = [load_file(tmp_path / str(step) / "model.safetensors") for step in steps]
    finished = run(
        1, "-m", "pipeline", "export", source, "--average", "40,20,30", "--out", tmp_path / "average", logs=tmp_path
    )
    assert finished.codes == [0], finished.output
    average = load_file(tmp_path / "average/model.safetensors")
    assert average.keys() == each[0].keys()
    for name, found in average.items():
        stacked = np.stack([weights[name].numpy() for weights in each])
        assert np.array_equal(found.numpy(), stacked.mean(axis=0, dtype=np.float64).astype(np.float32)), name
    losses = [open_checkpoint(source / f"checkpoints/step-{step:08d}").record.probe_loss for step in steps]
    assert f"{losses[0]:.5f} at step 20, {losses[1]:.5f} at step 30, {losses[2]:.5f} at step 40; " in finished.output
    assert json.loads((tmp_path / "average/training/checkpoint.json").read_text())["averaged_steps"] == [20, 30, 40]
    card = (tmp_path / "average/README.md").read_text()
    assert "| Weights | the mean of those at steps 20, 30, 40 |" in card
    assert "| Last training loss of the run, not of the averaged weights |" in card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--average", "20,x"], "--average is '20,x'; it must be steps separated by commas, such as 1000,2000,3000."),
        (["--average", "20"], "--average is 20; it must be two or more steps, each once, such as 1000,2000,3000."),
        (["--average", "20,20"], "--average is 20,20; it must be two or more steps, each once, such as"),
        (["--average", "20,25"], "has no checkpoint of this step; it has 20, 30, 40."),
        (["--average", "20,30", "--step", "20"], "--step and --average both name checkpoints; give one of them."),
        (
            ["--average", "20,30", "--weights", "ema"],
            "--average takes the mean of raw weights, and --weights is ema; give",
        ),
        (["--weights", "ema"], "step-00000040 has no average of the weights, because its run had ema.decay 0; omit"),
        (["--weights", "mean"], "weights is 'mean'; it must be one of raw, ema (see python -m pipeline export --help)"),
    ],
)
def test_weights_that_can_not_be_exported(
    options: list[str], message: str, finished_run: Runner, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        export_command([str(finished_run.folder / "reference"), "--out", str(tmp_path / "model"), *options])
    assert not (tmp_path / "model").exists()


def test_the_stock_block_exports_to_gpt2(runner: Runner, tmp_path: Path) -> None:
    assert runner.train("run", model__block="gpt2", schedule__steps=10).codes == [0]
    checkpoint = find_checkpoint(runner.folder / "run")
    export(checkpoint, tmp_path / "model")
    theirs, weights = GPT2LMHeadModel.from_pretrained(tmp_path / "model"), CheckpointWeights(checkpoint)
    ours = build_model(weights.config)
    ours.load_state_dict(dict(weights))
    tokens = torch.randint(0, 512, (2, 64))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens).logits, atol=1e-4, rtol=0)


def test_a_model_of_several_files(finished_run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = find_checkpoint(finished_run.folder / "reference")
    export(checkpoint, tmp_path / "one")
    monkeypatch.setattr(lazy_weights, "FILE_SIZE", "100KB")
    export(checkpoint, tmp_path / "several")
    files = sorted(file.name for file in (tmp_path / "several").glob("*.safetensors"))
    assert files == [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    weights = load_file(tmp_path / "one/model.safetensors")
    loaded = ImageGPTForCausalImageModeling.from_pretrained(tmp_path / "several").state_dict()
    assert weights.keys() <= loaded.keys()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


def test_a_model_that_fetches_its_weights_has_none_in_memory(finished_run: Runner) -> None:
    checkpoint = find_checkpoint(finished_run.folder / "reference")
    weights = CheckpointWeights(checkpoint)
    fetching, holding = lazy_weights.fetching_model(weights.config, weights), build_model(weights.config)
    holding.load_state_dict(dict(weights))
    tokens = torch.randint(512, (2, 64))
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(fetching(tokens).logits, holding(tokens).logits, atol=0, rtol=0)
        assert all(parameter.is_meta for parameter in fetching.parameters())


def test_a_run_can_be_given_as_a_model(finished_run: Runner, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished_run.folder / "reference", tmp_path / "run"))
    folder = model_folder(copy)
    assert load_model_folder(folder).resolution == 8
    assert model_folder(folder) == folder
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-9] + b"?" + weights[-8:])
    assert model_folder(copy) == folder
    assert (folder / "model.safetensors").read_bytes() == weights, "exported again"
    made_from = folder / ".made_from"
    made_from.write_text(made_from.read_text().split()[0])  # as earlier versions wrote it
    made = (folder / "config.json").stat().st_mtime_ns
    assert (model_folder(copy) / "config.json").stat().st_mtime_ns == made


def test_another_checkpoint_of_the_same_step_is_another_model(finished_run: Runner, tmp_path: Path) -> None:
    """As after going back to an older step, and on from there with another rate."""
    run_folder = tmp_path / "run"
    shutil.copytree(finished_run.folder / "reference", run_folder)
    shutil.rmtree(run_folder / "exported", ignore_errors=True)
    [*_, older, newest] = sorted((run_folder / "checkpoints").glob("step-*"))
    first = load_file(model_folder(newest) / "model.safetensors")
    (run_folder / "exported" / f".{newest.name}.1-killed.partial").mkdir()
    made = (run_folder / "exported" / newest.name / "config.json").stat().st_mtime_ns
    assert (model_folder(newest) / "config.json").stat().st_mtime_ns == made, "once for all who ask"
    shutil.rmtree(newest)
    older.rename(newest)
    second = load_file(model_folder(newest) / "model.safetensors")
    assert not torch.equal(first["lm_head.weight"], second["lm_head.weight"])
    assert sorted(path.name for path in (run_folder / "exported").iterdir()) == [".lock", newest.name]


def test_a_folder_without_a_model_is_an_error(runner: Runner, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a model"):
        model_folder(tmp_path)
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        find_checkpoint(tmp_path / "run")


def test_a_damaged_checkpoint_is_not_exported(finished_run: Runner, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished_run.folder / "reference", tmp_path / "run"))
    file = copy / "checkpoints/step-00000040/rank-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-50] ^= 4
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"rank-00001.safetensors is damaged"):
        export(find_checkpoint(copy), tmp_path / "model")
    assert not (tmp_path / "model").exists()
