"""Probes of runs, on every layout, against transformers and scikit-learn; and that they change nothing."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifier
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import ImageGPTForCausalImageModeling

from pipeline.config import DataConfig, ModelConfig, TrainConfig
from pipeline.model_folder.export import export, find_checkpoint
from pipeline.probe_config import STRENGTHS, ProbeConfig
from pipeline.probe_images import LabelledImages, open_probe_images
from pipeline.training_set import open_training_sets
from tests.launch import run, start
from tests.pipeline.conftest import TINY, Runner
from tests.pipeline.evaluate.tiny_sets import COLORS, RESOLUTION, random_images, random_palette, write_shard_set

LAYERS, STEPS = 3, 4
TOLERANCE = 0.003
"""Of an accuracy: 0.3 points."""
PROBED = {"probe.train_images": 300, "probe.test_images": 400}
FEW = {"probe.train_images": 40, "probe.test_images": 20}
"""Where the accuracies are not compared."""
SMALL = TINY | {
    "model.resolution": RESOLUTION,
    "model.layers": LAYERS,
    "model.width": 16,
    "schedule.decay": "constant",
    "schedule.warmup_steps": 1,
    "batch.micro_size": 2,
    "checkpoint.every_steps": STEPS,
    "validation.every_steps": 100,
    "validation.images": 4,
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": (1, {}),
    "4 ranks": (4, {}),
    "ZeRO-3": (2, {"parallel.zero_stage": 3}),
    "stages": (2, {"parallel.pipeline_stages": 2}),
    "tensor": (2, {"parallel.tensor_parallel": 2}),
    "stages and data": (4, {"parallel.pipeline_stages": 2}),
}
SLOW = {name: pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS}


class ProbeRunner(Runner):
    """Runs on a small set of classes that differ in their colors."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "set", folder)
        splits = {"train": random_images(400, 1), "valid": random_images(900, 2)}
        write_shard_set(self.shards, splits, random_palette())

    def train_with(self, name: str, layout: str = "1 rank", **options: Any) -> list[dict[str, Any]]:
        """Trains or resumes a run, and returns its rows."""
        ranks, parallel = LAYOUTS[layout]
        keys = SMALL | parallel | {key.replace("__", "."): value for key, value in options.items()}
        words = [f"--{key}={value}" for key, value in ({"data.shards": self.shards} | keys).items()]
        logs = self.folder / f"{name}.logs"
        finished = run(ranks, "-m", "pipeline", "train", f"--run={self.folder / name}", *words, logs=logs)
        assert finished.codes == [0] * ranks, "\n".join(finished.outputs)
        return self.rows(name)

    def probe_on(self, layout: str) -> dict[str, Any]:
        """The probe of the same checkpoint on a layout: a run that resumes probes the step that it loaded."""
        if not (self.folder / "run").exists():
            self.train_with("run", schedule__steps=STEPS)
        shutil.copytree(self.folder / "run", self.folder / layout)
        rows = self.train_with(layout, layout, schedule__steps=STEPS + 1, probe__every_steps=STEPS, **PROBED)
        found = [row for row in rows if "probe_accuracy" in row]
        assert [row["step"] for row in found] == [STEPS, STEPS + 1]
        return found[0]


@pytest.fixture
def runner(tmp_path: Path) -> ProbeRunner:
    return ProbeRunner(tmp_path)


def features_by_transformers(model: Path, images: LabelledImages) -> list[np.ndarray]:
    """The mean over positions of what each block's first norm, and the last norm, returns: float64 (N, D) a layer."""
    gpt = ImageGPTForCausalImageModeling.from_pretrained(model).eval()
    norms = [*(block.ln_1 for block in gpt.transformer.h), gpt.transformer.ln_f]
    seen: list[np.ndarray] = []
    for norm in norms:
        norm.register_forward_hook(lambda *given: seen.append(given[2].double().mean(dim=1).numpy()))
    tokens = torch.from_numpy(images.split.gather(images.numbers)[0].astype(np.int64))
    with torch.no_grad():
        gpt(input_ids=torch.cat([torch.full((len(tokens), 1), COLORS), tokens[:, :-1]], dim=1))
    return seen


def reference(model: Path, shards: Path) -> list[float]:
    """The accuracy of each layer by transformers and scikit-learn."""
    probe = ProbeConfig(every_steps=1, **{key.removeprefix("probe."): value for key, value in PROBED.items()})
    shape = ModelConfig(layers=1, width=8, heads=1, resolution=RESOLUTION)
    config = TrainConfig(model=shape, data=DataConfig(shards=str(shards)), probe=probe)
    images = open_probe_images(config, open_training_sets(config))
    assert images is not None
    layers = zip(
        *(features_by_transformers(model, part) for part in (images.train, images.choice, images.test)), strict=True
    )
    accuracies = []
    for train, choice, test in layers:
        _, classes, counts = np.unique(images.train.labels, return_inverse=True, return_counts=True)
        weights = len(classes) / (len(counts) * counts[classes])
        mean_eigenvalue = len(train) * np.cov(train.T, aweights=weights, bias=True).trace() / train.shape[1]
        fitted = [
            RidgeClassifier(alpha=strength * mean_eigenvalue, class_weight="balanced").fit(train, images.train.labels)
            for strength in STRENGTHS
        ]
        best = max(fitted, key=lambda ridge: ridge.score(choice, images.choice.labels))
        accuracies.append(best.score(test, images.test.labels))
    return accuracies


@pytest.mark.slow
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "1 rank"])
def test_the_accuracies_are_those_of_scikit_learn_and_of_one_rank(runner: ProbeRunner, layout: str) -> None:
    alone, row = runner.probe_on("1 rank"), runner.probe_on(layout)
    export(find_checkpoint(runner.folder / "run"), runner.folder / "model")
    expected = reference(runner.folder / "model", runner.shards)
    print(
        f"\n{layout}: {row['probe_accuracy_by_layer']}, 1 rank: {alone['probe_accuracy_by_layer']}, sklearn: {expected}"
    )
    for found in (alone, row):
        assert found["probe_accuracy_by_layer"] == pytest.approx(expected, abs=TOLERANCE)
        assert found["probe_accuracy"] == found["probe_accuracy_by_layer"][found["probe_layer"]]
    if layout == "4 ranks":
        assert row == alone
    assert len(set(expected)) > 1
    assert max(expected) > 0.5, "of three classes"


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["1 rank", "ZeRO-3"])
def test_a_masked_model_sees_all_pixels(runner: ProbeRunner, layout: str) -> None:
    masked = {"objective__kind": "masked_color", "schedule__steps": 2, "probe__every_steps": 1, **PROBED}
    rows = runner.train_with(layout, layout, **masked)
    found = [row for row in rows if "probe_accuracy" in row]
    assert [row["step"] for row in found] == [1, 2]
    assert found[0]["probe_accuracy_by_layer"][0] > 0.5


@pytest.mark.parametrize("layout", ["ZeRO-3", *(SLOW[name] for name in LAYOUTS if name != "ZeRO-3")])
def test_probes_change_nothing(runner: ProbeRunner, layout: str) -> None:
    dropout = 0 if layout == "tensor" else 0.1  # its random numbers must not be moved either
    common = {"schedule__steps": 2 * STEPS, "model__dropout": dropout, "validation__every_steps": 3}
    without = runner.train_with("without", layout, **common)
    probed = runner.train_with("with", layout, **common, probe__every_steps=2, **FEW)
    assert len([row for row in probed if "probe_accuracy" in row]) == STEPS
    kinds = ("loss", "grad_norm", "valid_loss")
    values = [[[row[kind] for row in rows if kind in row] for kind in kinds] for rows in (without, probed)]
    assert values[0] == values[1]
    files = [
        json.loads((runner.folder / name / f"checkpoints/step-{2 * STEPS:08d}/checkpoint.json").read_text())["files"]
        for name in ("without", "with")
    ]
    assert files[0] == files[1], "weights, moments and random states"


def test_what_a_run_shows(runner: ProbeRunner) -> None:
    runner.train_with("run", schedule__steps=2, probe__every_steps=1, **FEW)
    log = (runner.folder / "run.logs/rank-0.log").read_text()
    assert "2 probes of 4 layers, every 1 steps: 40 images in 3 classes and 2 x 20 held-out ones of" in log
    assert f"of {runner.shards} (not counted how many images of valid are also in train); " in log
    assert "step 2: probe accuracy" in log
    events = EventAccumulator(str(runner.folder / "run/tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    rows = [row for row in runner.rows("run") if "probe_accuracy" in row]
    scalars = [event.value for event in events.Scalars("probe/accuracy")]
    assert scalars == pytest.approx([row["probe_accuracy"] for row in rows])
    assert len(events.Scalars("probe/layer/03")) == 2
    assert [event.step for event in events.Images("probe/accuracy_by_depth")] == [1, 2]
    shown = run(1, "-m", "pipeline", "status", runner.folder / "run", logs=runner.folder / "status")
    assert f"probe     {rows[-1]['probe_accuracy']:.1%} at layer {rows[-1]['probe_layer']}, at step 2" in shown.output


@pytest.mark.slow
def test_a_request_to_stop_ends_a_probe_and_the_next_start_repeats_it(runner: ProbeRunner) -> None:
    splits = {"train": random_images(20_000, 1), "valid": random_images(2000, 2)}
    write_shard_set(runner.shards, splits, random_palette())
    options = SMALL | {"data.shards": runner.shards, "schedule.steps": 2, "probe.every_steps": 1}
    options |= {"probe.train_images": 20_000, "probe.test_images": 1000}
    words = [f"--{key}={value}" for key, value in options.items()]
    processes = start(
        1, "-m", "pipeline", "train", f"--run={runner.folder / 'run'}", *words, logs=runner.folder / "logs"
    )
    metrics = runner.folder / "run/metrics.jsonl"
    while not metrics.is_file() or not metrics.read_text():
        time.sleep(0.05)
    os.killpg(processes[0].pid, signal.SIGTERM)
    assert processes[0].wait() == 75
    assert "a request to stop ended the evaluation of step 1" in (runner.folder / "logs/rank-0.log").read_text()
    assert not [row for row in runner.rows("run") if "probe_accuracy" in row]
    rows = runner.train_with("run", schedule__steps=2, probe__every_steps=1, **FEW)
    assert [row["step"] for row in rows if "probe_accuracy" in row] == [1, 2]


@pytest.mark.slow
def test_with_compile_the_features_are_the_eager_ones_and_nothing_is_compiled_again(runner: ProbeRunner) -> None:
    runner.train_with("run", schedule__steps=STEPS)
    found = {}
    for compiled in ("true", "false"):
        shutil.copytree(runner.folder / "run", runner.folder / compiled)
        probed = {"schedule__steps": STEPS + 3, "probe__every_steps": 1, **PROBED}
        found[compiled] = [
            row for row in runner.train_with(compiled, **probed, compile=compiled) if "probe_layer" in row
        ]
        assert "compiled a block again" not in (runner.folder / f"{compiled}.logs/rank-0.log").read_text()
    assert [row["step"] for row in found["true"]] == [STEPS, STEPS + 1, STEPS + 2, STEPS + 3]
    assert found["true"][0] == found["false"][0], "of the checkpoint's weights"


@pytest.mark.slow
def test_with_bf16_the_accuracies_are_almost_those_of_fp32(runner: ProbeRunner) -> None:
    runner.train_with("run", schedule__steps=STEPS)
    found = {}
    for precision in ("fp32", "bf16"):
        shutil.copytree(runner.folder / "run", runner.folder / precision)
        probed = {"schedule__steps": STEPS + 1, "probe__every_steps": STEPS, **PROBED}
        rows = runner.train_with(precision, **probed, precision=precision)
        found[precision] = next(row["probe_accuracy_by_layer"] for row in rows if "probe_layer" in row)
    print(found)
    assert found["bf16"] != found["fp32"]
    assert found["bf16"] == pytest.approx(found["fp32"], abs=0.03)


@pytest.mark.slow
def test_a_mixture_is_probed_on_a_set_of_its_own(runner: ProbeRunner) -> None:
    for number, name in enumerate(("one", "two")):
        splits = {split: random_images(60, 10 + number, unlabelled=60) for split in ("train", "valid")}
        write_shard_set(runner.folder / name, splits, random_palette())
    mixture = json.dumps([{"shards": str(runner.folder / name), "weight": 1} for name in ("one", "two")])
    data = {"data__shards": "null", "data__mixture": mixture, "probe__shards": runner.shards}
    rows = runner.train_with("run", schedule__steps=2, probe__every_steps=1, **data, **PROBED)
    assert [row["step"] for row in rows if "probe_accuracy" in row] == [1, 2]
    assert f"held-out ones of {runner.shards} (" in (runner.folder / "run.logs/rank-0.log").read_text()
    assert json.loads((runner.folder / "run/run.json").read_text())["probe_shards"] == str(runner.shards)
