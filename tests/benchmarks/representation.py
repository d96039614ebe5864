"""Representations after equal CPU time: make bench PARTS=representation, about 70 CPU-minutes, resumable.

Each method pretrains for 20 CPU-minutes on the training images of CIFAR-10 at 16x16: ours as `pipeline train` does on
their tokens, and lightly's AIM and SimCLR on the same images in the same 512 colors. Then the same linear probe is
fitted on frozen features, its layer and L2 strength chosen on the validation images, and scored once on test.
Environment: REPRESENTATION_SHARDS (a shard set of CIFAR-10 at 16x16, out/evidence/shards), REPRESENTATION_OUT
(out/representation, where an interrupted run continues), REPRESENTATION_MINUTES (20).
"""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.shards.format import MANIFEST
from data_prep.shards.reader import open_shard_set
from pipeline.evaluate.classifiers.logistic import LinearClassifier, fit_logistic
from pipeline.evaluate.features.labelled import Labelled
from pipeline.evaluate.options import L2_STRENGTHS
from tests.benchmarks.marks import Result
from tests.benchmarks.peers.install import ERROR, FOLDER, ROOT

SPLITS = ("train", "valid", "test")
RESOLUTION = 16
OURS = {
    "model.layers": 8, "model.width": 96, "model.heads": 2, "model.resolution": RESOLUTION, "data.flip": True,
    "precision": "fp32", "optimizer.learning_rate": 0.006, "batch.global_size": 32, "batch.micro_size": 32,
    "checkpoint.every_steps": 200, "checkpoint.keep_last": 1, "checkpoint.keep_every": 0,
    "validation.every_steps": 1_000_000, "samples.every_steps": 0,
}  # fmt: skip
WARM_UP = 0.05
"""Of the steps, as with the peers."""
CALIBRATION = (2, 52)
"""Steps of the two short runs whose difference gives the CPU time of a step."""
METHODS = {
    "AIM, ViT of 8 blocks of width 96 (lightly)": "aim",
    "SimCLR, small ResNet (lightly)": "simclr",
}


def table(_: Path) -> Iterator[str | Result]:
    """Lines: accuracy of each method on test."""
    shards = Path(os.environ.get("REPRESENTATION_SHARDS", ROOT / "out/evidence/shards"))
    out = Path(os.environ.get("REPRESENTATION_OUT", ROOT / "out/representation"))
    seconds = 60 * float(os.environ.get("REPRESENTATION_MINUTES", 20))
    if not (shards / MANIFEST).exists():
        sys.exit(f"error: REPRESENTATION_SHARDS is {shards}, which is not a shard set; name one of CIFAR-10 at 16x16.")
    out.mkdir(parents=True, exist_ok=True)
    write_images(shards, out / "images")
    work = f"after {seconds / 60:g} CPU-minutes of pretraining"
    yield f"| {work} | linear probe, test accuracy | best layer |"
    yield "|---|---|---|"
    test = np.load(out / "images" / "test_labels.npy")
    error = np.sqrt(0.25 / len(test))
    ours = our_probe(shards, out / f"ours-{OURS['precision']}", seconds)
    yield f"| next color, 8 blocks of width 96, ours | {ours['test_accuracy']:.1%} | {ours['best_layer']} of 8 |"
    yield f"| raw pixels | {ours['raw_pixel_test_accuracy']:.1%} | |"
    best, best_name = None, ""
    for name, method in METHODS.items():
        accuracy, cells = peer_cells(method, out, seconds)
        yield f"| {name} | {cells} |"
        if accuracy is not None and (best is None or accuracy > best):
            best, best_name = accuracy, name
    yield f"\n{len(test):,} test images: the standard error is {error:.1%} at most; one pretraining each."
    yield Result(f"linear probe on CIFAR-10 {work}", "accuracy", ours["test_accuracy"], best_name, best)


def write_images(shards: Path, folder: Path) -> None:
    """Images of each split in the palette's colors, uint8 (N, S, S, 3), and their labels."""
    if (folder / "written").exists():
        return
    folder.mkdir(exist_ok=True)
    opened = open_shard_set(shards)
    colors = np.round((opened.palette + 1) * 127.5).astype(np.uint8)  # (V, 3)
    for name in SPLITS:
        split = opened.split(name)
        tokens, labels = split.gather(np.arange(split.images))
        np.save(folder / f"{name}.npy", colors[tokens].reshape(-1, opened.resolution, opened.resolution, 3))
        np.save(folder / f"{name}_labels.npy", labels)
    (folder / "written").touch()


def our_probe(shards: Path, folder: Path, seconds: float) -> dict[str, float]:
    """Trains by `pipeline train` for that time, and probes by `pipeline evaluate`; its linear_probe.json."""
    folder.mkdir(exist_ok=True)
    steps = int(seconds / step_seconds(shards, folder))
    train(shards, folder / f"run-{steps}", steps)
    results = folder / f"results-{steps}"
    options = ["--shards", shards, "--tasks", "linear_probe", "--out", results]
    command(sys.executable, "-m", "pipeline", "evaluate", folder / f"run-{steps}", *options)
    return json.loads((results / "linear_probe.json").read_text())


def train(shards: Path, run: Path, steps: int) -> float:
    """Runs `pipeline train`; the CPU-seconds that it used."""
    keys = {**OURS, "schedule.steps": steps, "schedule.warmup_steps": max(1, round(WARM_UP * steps))}
    options = [f"--{key}={str(value).lower() if value is True else value}" for key, value in keys.items()]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command(sys.executable, "-m", "pipeline", "train", "--run", run, f"--data.shards={shards}", *options)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def step_seconds(shards: Path, folder: Path) -> float:
    """CPU-seconds of a step: the difference of two short runs, which start alike; measured once."""
    file = folder / "step_seconds.json"
    if not file.exists():
        few, more = (train(shards, folder / f"calibration-{steps}", steps) for steps in CALIBRATION)
        file.write_text(json.dumps((more - few) / (CALIBRATION[1] - CALIBRATION[0])))
    return json.loads(file.read_text())


def peer_cells(method: str, out: Path, seconds: float) -> tuple[float | None, str]:
    """The accuracy of a method of lightly, and the cells with it and its best layer, or with its error."""
    environment, folder = FOLDER / "lightly", out / method
    if (environment / ERROR).exists():
        return None, f"not installed: {(environment / ERROR).read_text().strip()} |"
    folder.mkdir(exist_ok=True)
    if not (folder / "test.npy").exists():
        module = f"tests.benchmarks.peers.representation.{method}"
        try:
            command(environment / "bin/python", "-m", module, out / "images", folder, seconds)
        except (subprocess.CalledProcessError, OSError) as error:
            return None, f"fails: {error} |"
    accuracy, layer, layers = probe(folder, out / "images")
    return accuracy, f"{accuracy:.1%} | {layer} of {layers}"


def probe(folder: Path, images: Path) -> tuple[float, int, int]:
    """Test accuracy of our probe on a peer's features, its layer, counted from 1, and the number of layers."""
    features = {split: np.load(folder / f"{split}.npy") for split in SPLITS}  # float32 (layers, N, D)
    labels = {split: np.load(images / f"{split}_labels.npy") for split in SPLITS}
    fitted = []
    for layer in range(len(features["train"])):
        train, valid = (Labelled(features[split][layer], labels[split]) for split in ("train", "valid"))
        fitted.append(fit_logistic(train, valid, L2_STRENGTHS))
    best = int(np.argmax([each["valid_accuracy"] for each in fitted]))
    test = Labelled(features["test"][best], labels["test"])
    return LinearClassifier.of(fitted[best]).accuracy(test), best + 1, len(fitted)


def command(*words: object) -> None:
    """Runs it on one thread, with its output on standard error."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(list(map(str, words)), check=True, cwd=ROOT, env={**os.environ, **threads}, stdout=sys.stderr)
