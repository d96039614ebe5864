"""A run that starts from other weights: the losses it begins with, what it records, and what is refused."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling, ImageGPTImageProcessorPil

from data_prep.common.files import json_digest, read_json
from data_prep.shards.reader import open_shard_set
from pipeline.checkpoint.format import open_checkpoint
from pipeline.checkpoint.fragments import EMA
from pipeline.checkpoint.run_folder import RunFolder
from pipeline.command_line import parse_training
from pipeline.config import ModelConfig, TrainConfig
from pipeline.distributed import Ranks
from pipeline.model.gpt import build_model, initialize
from pipeline.model.gpt_config import gpt2_config
from pipeline.model_folder.convert import save_model_folder
from pipeline.operate.preflight.command import preflight_command
from pipeline.train import start
from pipeline.train.data.batches import ImageOrder
from pipeline.train.setup import check_inputs
from pipeline.train.start import check_origin
from pipeline.weights.model_files import model_digest
from pipeline.weights.start import checkpoint_origin, folder_origin, reader_of
from tests.launch import run
from tests.pipeline.checkpoint.test_any_topology import TOPOLOGIES
from tests.pipeline.conftest import Runner, made_once
from tests.pipeline.train.test_ema import averaged_plainly, checkpoints_of, difference, weights_of

CONSTANT = {"schedule__decay": "constant", "schedule__warmup_steps": 0, "batch__micro_size": 2}
TRUNK = {**CONSTANT, "schedule__steps": 30, "checkpoint__keep_last": 3}
BRANCH = {**CONSTANT, "schedule__steps": 20, "start__moments": True, "start__position": True}
TOLERANCE = 1e-6
"""Nats per token; in fp32 another layout adds in another order."""


def layout(name: str) -> dict[str, object]:
    _, stage, stages, parts = TOPOLOGIES[name]
    return {"parallel__zero_stage": stage, "parallel__pipeline_stages": stages, "parallel__tensor_parallel": parts}


def train_in_order(runner: Runner, name: str, runs: dict[str, dict[str, Any]]) -> str:
    """One run after the other in the same processes. What rank 0 wrote."""
    ranks, file = TOPOLOGIES[name][0], runner.folder / "runs.json"
    file.write_text(json.dumps([runner.arguments(run, **layout(name), **keys)[3:] for run, keys in runs.items()]))
    finished = run(ranks, "-m", "tests.pipeline.train.several_runs", file, logs=runner.folder / "logs")
    assert finished.codes == [0] * ranks, "\n".join(finished.outputs)
    return finished.output


@pytest.fixture(scope="session")
def trunk(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """A run named "trunk" at a constant rate, 30 steps on one rank, checkpoints of 10, 20, 30; tests only read it."""

    def make(folder: Path) -> None:
        Runner(shards, folder).check_trains("trunk", 1, **TRUNK)

    return Runner(shards, made_once(tmp_path_factory, "trunk", make))


@pytest.mark.parametrize(
    "topology", ["Z3x2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("1 rank", "PP2", "tp2"))]
)
def test_a_branch_continues_its_trunk(runner: Runner, trunk: Runner, topology: str) -> None:
    """With moments and position, on any layout; without moments the first loss is the same."""
    path = trunk.folder / "trunk/checkpoints/step-00000010"
    weights = {**CONSTANT, "schedule__steps": 1, "start__position": True}
    output = train_in_order(
        runner, topology, {"branch": {**BRANCH, "start__path": path}, "weights": {**weights, "start__path": path}}
    )
    rows = [row for row in trunk.rows("trunk") if "loss" in row][10:]
    branch = [row for row in runner.rows("branch") if "loss" in row]
    assert runner.losses("branch") == pytest.approx([row["loss"] for row in rows], abs=TOLERANCE)
    assert [row["images"] for row in branch] == [row["images"] for row in rows]
    assert runner.losses("weights") == pytest.approx([rows[0]["loss"]], abs=TOLERANCE)
    saved = read_json(path / "checkpoint.json")
    assert f"started from {path} (step 10), sha256" in output
    assert "the weights, Adam's moments after 10 updates, the data position, 80 images; the loss of" in output
    assert f"(when saved: {saved['probe_loss']:.7f})" in output
    origin = read_json(runner.folder / "branch/run.json")["origin"]
    assert (origin["path"], origin["step"], origin["images"]) == (str(path), 10, 80)
    assert origin["probe_loss"] == pytest.approx(saved["probe_loss"], abs=TOLERANCE)
    assert len(origin["digest"]) == 64


def test_a_resumed_run_does_not_need_its_origin(runner: Runner, trunk: Runner) -> None:
    """Nor its newest checkpoint to be complete: an older one is used, as when a run resumes."""
    origin = runner.folder / "origin"
    shutil.copytree(trunk.folder / "trunk", origin)
    with (origin / "checkpoints/step-00000030/rank-00000.safetensors").open("r+b") as file:
        file.truncate(1000)
    keys = {**BRANCH, "start__path": origin}
    finished = runner.train("run", 1, **keys | {"schedule__steps": 6})
    assert finished.codes == [0], finished.output
    assert "skipped the damaged checkpoint" in finished.output
    assert f"started from {origin}/checkpoints/step-00000020 (step 20)" in finished.output
    shutil.rmtree(origin)
    finished = runner.train("run", 1, **keys | {"schedule__steps": 10})
    assert finished.codes == [0], finished.output
    assert "started from" not in finished.output
    assert runner.losses("run") == pytest.approx(trunk.losses("trunk")[20:], abs=TOLERANCE)
    assert read_json(runner.folder / "run/run.json")["origin"]["step"] == 20


def test_a_branch_of_a_run_with_an_average(runner: Runner) -> None:
    """With moments it takes the average too; weights only, its average starts from the weights."""
    average = {"ema__decay": 0.9, "checkpoint__every_steps": 1, "checkpoint__keep_every": 1}
    keys, path = {**CONSTANT, **average}, runner.folder / "trunk/checkpoints/step-00000004"
    branch = {**keys, "schedule__steps": 2, "start__path": path, "start__position": True}
    moments = {**branch, "start__moments": True}
    output = train_in_order(
        runner,
        "1 rank",
        {
            "trunk": {**keys, "schedule__steps": 6},
            "moments": moments,
            "weights": branch,
            "without": {**moments, "ema__decay": 0},
        },
    )
    assert "Adam's moments after 4 updates, the average of the weights, the data position" in output
    assert output.count("is dropped, because ema.decay is 0") == 1
    trunk, with_moments, weights = (checkpoints_of(runner, name) for name in ("trunk", "moments", "weights"))
    assert with_moments[-1].record.fingerprints == trunk[-1].record.fingerprints, "moments and average, bit for bit"
    steps = (weights_of(one) for one in weights)
    expected = averaged_plainly(weights_of(trunk[3]), steps)
    assert difference(weights_of(weights[-1], EMA), expected) <= TOLERANCE


@pytest.mark.slow
def test_a_masked_branch_of_another_mask_probability(runner: Runner) -> None:
    """The check image is in the checkpoint with its masks; in older checkpoints it is not, and is not compared."""
    masked = {**CONSTANT, "objective__kind": "masked_color", "schedule__steps": 2}
    runner.check_trains("trunk", 1, **masked)
    path = runner.folder / "trunk/checkpoints/step-00000002"
    content = read_json(path / "checkpoint.json")
    assert len(content["probe_batch"]["masked"][0]) == len(content["probe_batch"]["tokens"][0])
    branch = {**masked, "objective__mask_probability": 0.4, "start__path": path}
    finished = runner.train("branch", 1, **branch, start__position=True)
    assert finished.codes == [0], finished.output
    assert f"(when saved: {content['probe_loss']:.7f})" in finished.output
    del content["sha256"], content["probe_batch"]
    (path / "checkpoint.json").write_text(json.dumps(content | {"sha256": json_digest(content)}))
    finished = runner.train("older", 1, **branch, start__position=True)
    assert finished.codes == [0], finished.output
    assert f"(when saved, of another check image: {content['probe_loss']:.7f})" in finished.output


def save_imagegpt(folder: Path, palette: np.ndarray, **shape: int) -> ImageGPTForCausalImageModeling:
    """A random model of transformers' own class, in the format of OpenAI's releases; its head is not zero."""
    settings = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64, "vocab_size": len(palette) + 1, **shape}
    torch.manual_seed(0)
    model = ImageGPTForCausalImageModeling(ImageGPTConfig(**settings)).eval()
    model.save_pretrained(folder)
    ImageGPTImageProcessorPil(clusters=palette.tolist(), size={"height": 8, "width": 8}).save_pretrained(folder)
    return model


def test_the_first_loss_is_that_of_transformers(runner: Runner, tmp_path: Path) -> None:
    shards = open_shard_set(str(runner.shards))
    model = save_imagegpt(tmp_path / "model", shards.palette)
    runner.check_trains("run", 1, **CONSTANT, schedule__steps=1, start__path=tmp_path / "model")
    images, _ = ImageOrder(shards.split("train").record_images, seed=0).at(0, 8)
    tokens = torch.from_numpy(shards.split("train").gather(images)[0].astype(np.int64))  # (B, T)
    inputs = torch.cat([torch.full((8, 1), shards.colors), tokens[:, :-1]], dim=1)
    with torch.no_grad():
        logits = model(inputs).logits  # (B, T, V)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).item()
    assert runner.losses("run") == pytest.approx([expected], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["1 rank", "Z3x2", "PP2"])
def test_initial_weights_in_a_folder_train_as_from_scratch(runner: Runner, tmp_path: Path, topology: str) -> None:
    """So Adam starts at step 0 with zero moments."""
    shards = open_shard_set(str(runner.shards))
    config = gpt2_config(ModelConfig(layers=2, width=32, heads=2, resolution=8), shards.colors)
    model = build_model(config)
    initialize(model, 0)
    save_model_folder(model, config, shards.palette, tmp_path / "model")
    keys = {**CONSTANT, "schedule__steps": 5}
    train_in_order(runner, topology, {"scratch": keys, "run": keys | {"start__path": tmp_path / "model"}})
    assert runner.losses("run") == runner.losses("scratch")


@cache
def tiny_config(runner_arguments: tuple[str, ...]) -> TrainConfig:
    return parse_training(list(runner_arguments))[0]


def refusal(runner: Runner, name: str = "run", **keys: object) -> str:
    """What a start is refused with before the ranks meet; a double underscore stands for the dot of a key."""
    sections: dict[str, dict[str, object]] = {}
    for key, value in keys.items():
        section, _, option = key.partition("__")
        sections.setdefault(section, {})[option] = str(value) if isinstance(value, Path) else value
    with pytest.raises(ValueError) as caught:
        config = tiny_config(tuple(Runner(runner.shards, Path("runs")).arguments("run")[3:]))
        changes = {
            section: options[""] if "" in options else replace(getattr(config, section), **options)
            for section, options in sections.items()
        }
        inputs = check_inputs(replace(config, **changes), Ranks(0, 1, 0, torch.device("cpu")))
        folder = RunFolder(runner.folder / name)
        folder.check(inputs.config, inputs.sets)
        check_origin(inputs, folder)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "no such path": ({"start__path": "/nowhere/run"}, "start.path is /nowhere/run, which does not exist; give a run,"),
    "no model": ({"start__path": "{shards}"}, "start.path is {shards}, which is not a model; give a run, a checkpoint"),
    "layers": ({"model__layers": 3}, "model.layers is 3, but start.path {trunk} has 2; set it to 2, or start from"),
    "width": ({"model__width": 64}, "model.width is 64, but start.path {trunk} has 32; set it to 32, or start from"),
    "heads": ({"model__heads": 4}, "model.heads is 4, but start.path {trunk} has 2; set it to 2, or start from"),
    "block": ({"model__block": "gpt2"}, "model.block is gpt2, but start.path {trunk} has igpt; set it to igpt, or"),
    "objective": (
        {"objective__kind": "masked_color"},
        "objective.kind is masked_color, but start.path {trunk} was trained with next_color; set it to next_color, or",
    ),
    "palette": ({"start__path": "{other palette}"}, "but start.path {other palette} was trained with the palette"),
    "activation": (
        {"start__path": "{relu}"},
        "start.path is {relu}, whose activation_function is relu; a model of block igpt has quick_gelu: start from",
    ),
    "moments of a folder": (
        {"start__path": "{folder}", "start__moments": True},
        "start.moments is true, but start.path {folder} is a model folder, which has weights only; give a run or a",
    ),
    "position of a folder": (
        {"start__path": "{folder}", "start__position": True},
        "start.position is true, but start.path {folder} is a model folder, which has weights only; give a run or a",
    ),
    "moments of a hub": (
        {"start__path": "hub:lab/image-gpt", "start__moments": True},
        "start.moments is true, but start.path is hub:lab/image-gpt, and a model on a hub has weights only; give a run",
    ),
    "malformed name": (
        {"start__path": "hub:image-gpt"},
        "hub:image-gpt is not the name of a model on a hub; it must be hub:ORG/NAME or hub:ORG/NAME@REVISION.",
    ),
    "moments of nothing": (
        {"start__path": None, "start__moments": True},
        "start.moments is true, but start.path is null; give a run or a checkpoint.",
    ),
    "moments at another resolution": (
        {"start__path": "{larger}", "start__moments": True},
        "start.moments is true, but start.path {larger} has resolution 16 and model.resolution is 8; moments of",
    ),
    "another shard set": (
        {"start__position": True, "data__shards": "{other shards}"},
        "start.position is true, but start.path {trunk} was trained on ",
    ),
    "another seed": (
        {"start__position": True, "seed": 1},
        "start.position is true, but start.path {trunk} has another data order than this run; seed, data.flip,",
    ),
    "a run without checkpoints": (
        {"start__path": "{empty}"},
        "start.path is {empty}, a run that has no checkpoint yet; give a run, a checkpoint, a model folder, or hub:",
    ),
    "a damaged manifest": (
        {"start__path": "{damaged}"},
        "start.path is {damaged}, and none of its checkpoints can be read: {damaged}/checkpoint.json is damaged (its",
    ),
    "a damaged folder": ({"start__path": "{broken}"}, "{broken}/config.json is not readable as JSON"),
}


@pytest.fixture(scope="session")
def origins(trunk: Runner, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What start.path may name, by its name in REFUSED; tests only read it."""
    folder = tmp_path_factory.mktemp("origins")
    paths = {name: folder / name.replace(" ", "-") for name in ("folder", "other palette", "relu", "broken", "empty")}
    paths |= {"trunk": trunk.folder / "trunk", "shards": trunk.shards, "damaged": folder / "damaged"}
    paths |= {"other shards": folder / "shards", "larger": folder / "larger"}
    palette = open_shard_set(str(trunk.shards)).palette
    save_imagegpt(paths["folder"], palette)
    for name, colors in (("other palette", -palette), ("relu", palette), ("broken", palette)):
        shutil.copytree(paths["folder"], paths[name])
        ImageGPTImageProcessorPil(clusters=colors.tolist(), size={"height": 8, "width": 8}).save_pretrained(paths[name])
    config = paths["relu"] / "config.json"
    config.write_text(json.dumps(read_json(config) | {"activation_function": "relu"}))
    (paths["broken"] / "config.json").write_text("{")
    (paths["empty"] / "checkpoints").mkdir(parents=True)
    shutil.copytree(paths["trunk"] / "checkpoints/step-00000030", paths["damaged"])
    manifest = paths["damaged"] / "checkpoint.json"
    manifest.write_text(manifest.read_text().replace('"step": 30', '"step": 31'))
    shutil.copytree(paths["trunk"] / "checkpoints/step-00000030", paths["larger"])
    content = read_json(paths["larger"] / "checkpoint.json")
    del content["sha256"]
    content["model"]["n_positions"] = 256
    (paths["larger"] / "checkpoint.json").write_text(json.dumps(content | {"sha256": json_digest(content)}))
    shutil.copytree(trunk.shards, paths["other shards"])
    listed = read_json(trunk.shards / "shards.json")
    (paths["other shards"] / "shards.json").write_text(json.dumps(listed | {"classes": listed["classes"][::-1]}))
    return paths


@pytest.mark.parametrize("case", REFUSED, ids=lambda name: name.replace(" ", "-"))
def test_what_is_refused(runner: Runner, origins: dict[str, Path], case: str) -> None:
    keys, sentence = REFUSED[case]
    keys = {key: value.format_map(origins) if isinstance(value, str) else value for key, value in keys.items()}
    assert sentence.format_map(origins) in refusal(runner, **{"start__path": origins["trunk"], **keys})
    assert not (runner.folder / "run").exists()


@pytest.mark.parametrize("inside", ["", "checkpoints/step-00000010", "exported/step-00000010", "../run"])
def test_a_run_does_not_start_from_itself(runner: Runner, inside: str) -> None:
    path = runner.folder / "run" / inside
    assert refusal(runner, start__path=path) == (
        f"start.path is {path}, which is --run itself or lies in it; name another run, or remove start.path: a run "
        f"resumes from its own checkpoints."
    )


def test_a_run_with_checkpoints_keeps_its_origin(runner: Runner, trunk: Runner, origins: dict[str, Path]) -> None:
    """Also one that started from initial weights."""
    path = runner.folder / "run"
    shutil.copytree(trunk.folder / "trunk", path)
    keys = {**TRUNK, "schedule__steps": 40}
    assert refusal(runner, **keys, start__path=origins["folder"]) == (
        f"start.path is {origins['folder']}, but {path} was started with null; set it to null, or name a new --run."
    )
    config = path / "config.yaml"
    config.write_text(config.read_text().replace("path: null", f"path: {origins['folder']}", 1))
    assert refusal(runner, **keys, start__path=origins["larger"]) == (
        f"start.path is {origins['larger']}, but {path} was started with {origins['folder']}; set it to "
        f"{origins['folder']}, or name a new --run."
    )


def test_nodes_must_read_the_same_model(origins: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    origin = folder_origin(str(origins["folder"]), origins["folder"])
    digest, ranks = model_digest(origins["folder"]), Ranks(0, 3, 0, torch.device("cpu"))
    monkeypatch.setattr(start, "raise_on_all_ranks", nullcontext)
    monkeypatch.setattr(start, "gather", lambda own: [own, None, digest])
    assert start._common_digest(origin, ranks) == digest
    monkeypatch.setattr(start, "gather", lambda own: [own, None, "f" * 64])
    with pytest.raises(ValueError) as caught:
        start._common_digest(origin, ranks)
    assert str(caught.value) == (
        f"start.path is {origins['folder']}, but rank 0 reads a model of sha256 {digest[:12]} there and rank 2 one of "
        f"ffffffffffff; all nodes must have the same model: name a folder that they share."
    )


def test_a_checkpoint_that_its_run_deletes(trunk: Runner, tmp_path: Path) -> None:
    shutil.copytree(trunk.folder / "trunk/checkpoints/step-00000030", tmp_path / "step-00000030")
    origin = checkpoint_origin(str(tmp_path), open_checkpoint(tmp_path / "step-00000030"))
    shutil.rmtree(tmp_path / "step-00000030")
    with pytest.raises(ValueError) as caught, start._explaining_deletion(origin):
        reader_of(origin, tiny_config(tuple(Runner(trunk.shards, Path("runs")).arguments("run")[3:])))
    assert str(caught.value) == (
        f"{tmp_path}/step-00000030 was deleted by its run; name a checkpoint that it keeps (checkpoint.keep_every)."
    )


def test_a_relative_path_means_the_same_from_another_directory(
    runner: Runner, origins: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(origins["folder"].parent)
    config = parse_training(runner.arguments("run", start__path="folder")[3:])[0]
    folder = RunFolder(runner.folder / "run")
    folder.open(config, check_inputs(config, Ranks(0, 1, 0, torch.device("cpu"))).sets, [], 1)
    folder.close()
    assert f"path: {origins['folder']}\n" in (folder.path / "config.yaml").read_text()
    monkeypatch.chdir(runner.folder)
    assert list(folder.changes(config)) == ["start.path"]


def test_the_login_node_refuses_a_bad_path(runner: Runner) -> None:
    with pytest.raises(ValueError, match=r"start\.path is /nowhere, which does not exist; give a run, a checkpoint,"):
        preflight_command(runner.arguments("run", start__path="/nowhere")[3:])
