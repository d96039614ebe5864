"""Every task of `evaluate`, through the command line, on the run that the part before has trained."""

import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.results.task_files import read_task_files
from tests.benchmarks.accelerator.common import TOY
from tests.benchmarks.accelerator.processes import alone, running
from tests.benchmarks.accelerator.report import Row, equal, known

SECONDS = 170.0
"""For the command."""
OPTIONS = {
    "tasks": "density,linear_probe,knn,low_data,attentive_probe,fine_tune,distill,completions",
    "train_images": 32 if TOY else 8000,
    "valid_images": 16 if TOY else 1000,
    "test_images": 16 if TOY else 2000,
    "batch_size": 8 if TOY else 256,
    "linear_probe.l2": "[0.01, 0.001]",
    "knn.k": "[20]",
    "low_data.subsets": 1,
    "low_data.per_class": "[2]" if TOY else "[25]",
    "low_data.layer": 1 if TOY else 12,
    "attentive_probe.epochs": 2,
    "attentive_probe.layers": "[1]" if TOY else "[12]",
    "attentive_probe.learning_rates": "[0.001]",
    "fine_tune.epochs": 1,
    "fine_tune.learning_rates": "[0.0003]",
    "distill.epochs": 1,
    "distill.learning_rates": "[0.001]",
    "completions.images": 4,
    "completions.distance_images": 0,
} | ({"attentive_probe.reflect_crop": 1, "fine_tune.reflect_crop": 1, "distill.reflect_crop": 1} if TOY else {})


def evaluate_run(run: Path, shards: Path) -> Iterator[Row]:
    """Small sizes: whether each task works on this device, and how long it takes."""
    out, log = run.parent / "results", run.parent / "evaluate.log"
    words = ["-m", "pipeline", "evaluate", str(run), "--shards", str(shards), "--out", str(out)]
    began = time.monotonic()
    with running([*words, *(f"--{key}={value}" for key, value in OPTIONS.items())], alone(), log) as process:
        code = process.wait(SECONDS)
    yield equal("evaluate: exit code", code, 0)
    yield known("evaluate: s", time.monotonic() - began)
    found = {content["task"]: content["summary"] for content in read_task_files(out)[0].values()}
    for name in str(OPTIONS["tasks"]).split(","):
        yield equal(f"evaluate: {name}, a result", name in found, True)
        yield known(f"evaluate: {name}", found.get(name, "none"))
