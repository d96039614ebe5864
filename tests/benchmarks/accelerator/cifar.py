"""A minute and a half of iGPT-S on CIFAR-10 through the command line, stopped by SIGUSR1, then evaluated."""

import json
import signal
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.accelerator.common import CUDA, OUT, TOY, free_memory, write_shards
from tests.benchmarks.accelerator.evaluation import evaluate_run
from tests.benchmarks.accelerator.processes import SECONDS as START_SECONDS
from tests.benchmarks.accelerator.processes import STOPPED, alone, rows, running, wait_for
from tests.benchmarks.accelerator.report import Row, at_most, equal, known

ARCHIVE = Path("out/accelerator-data/cifar10.tar.xz")
"""What `make accelerator-data` packs."""
SECONDS = 3.0 if TOY else 90.0
UNIFORM = 6.2383
"""ln 512: the loss of a model that has learned nothing."""
OPTIONS = {
    "model.size": "s",
    "model.resolution": 32,
    "optimizer.learning_rate": 0.003,
    "schedule.steps": 1_000_000,
    "schedule.warmup_steps": 100,
    "schedule.decay": "constant",
    "batch.global_size": 128,
    "batch.micro_size": 64,
    "checkpoint.every_steps": 500_000,
    "validation.every_steps": 250,
    "validation.images": 512,
    "samples.every_steps": 0,
    "compile": "true",
}
TOY_OPTIONS = {
    "model.size": "null",
    "model.layers": 2,
    "model.width": 32,
    "model.heads": 2,
    "model.resolution": 8,
    "schedule.warmup_steps": 2,
    "batch.global_size": 8,
    "batch.micro_size": 4,
    "validation.every_steps": 10,
    "validation.images": 8,
    "compile": "false",
}


def train_cifar() -> Iterator[Row | str]:
    """Trains for SECONDS after the first step, and evaluates; without the carried set on images that are made up."""
    free_memory()
    with tempfile.TemporaryDirectory() as folder:
        carried = ARCHIVE.is_file() and not TOY
        shards = unpacked(Path(folder) / "shards") if carried else made_up(Path(folder) / "shards")
        run, log = Path(folder) / "run", Path(folder) / "log"
        options = OPTIONS | (TOY_OPTIONS if TOY else {}) | {"run": run, "data.shards": shards}
        words = [f"--{key}={value}" for key, value in options.items()]
        began = time.monotonic()
        with running(["-m", "pipeline", "train", *words], alone(), log) as train:
            wait_for(lambda: len(rows(run)) >= 1, train)
            yield known("cifar: s to the first step", time.monotonic() - began)
            time.sleep(SECONDS)
            train.send_signal(signal.SIGUSR1)
            code = train.wait(START_SECONDS)
        (OUT / "cifar_metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
        yield equal("cifar: exit code", code, STOPPED)
        yield from _curve("CIFAR-10 (JPEG copy)" if carried else "made-up images", run)
        yield from evaluate_run(run, shards)


def _curve(images: str, run: Path) -> Iterator[Row | str]:
    found = rows(run)
    chosen = sorted({len(found) * part // 8 - 1 for part in range(1, 9)} - {-1})
    yield f"\n| iGPT-S on {images} | {' | '.join(str(int(found[i]['step'])) for i in chosen)} |"
    yield "|---" * (len(chosen) + 1) + "|"
    yield f"| loss, nats per token | {' | '.join(format(found[i]['loss'], '.4f') for i in chosen)} |"
    later = found[len(found) // 2 :]
    rate = sum(row["images_per_second"] for row in later) / len(later)
    yield known("cifar: images/s", rate)
    yield known("cifar: MFU", sum(row["mfu"] or 0.0 for row in later) / len(later))
    yield known("cifar: share of the time waited for data", max(row["data_wait"] for row in later))
    yield known("cifar: steps", len(found))
    yield at_most(f"cifar: last loss on {images}", found[-1]["loss"], UNIFORM if TOY or not CUDA else 5.0)
    valid = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "valid_loss" in line]
    if valid:
        yield known(f"cifar: validation loss at step {valid[-1]['step']}", valid[-1]["valid_loss"])


def unpacked(folder: Path) -> Path:
    """The carried shard set."""
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(folder, filter="data")
    return folder


def made_up(folder: Path) -> Path:
    """A shard set in its place."""
    return write_shards(folder, 64 if TOY else 8192, 8 if TOY else 32)
