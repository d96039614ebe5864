"""python -m tests.benchmarks: all tables for CPUs: this project and its peer, measured in alternating turns.

Arguments such as `model starting` choose some of the tables.
"""

import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from data_prep.palette.codec import encode, lookup_table
from data_prep.shards.format import MANIFEST
from data_prep.shards.reader import open_shard_set
from pipeline.config import ModelConfig
from pipeline.train.data.batches import ImageOrder, TrainingBatches
from tests.benchmarks import (
    completion_peers,
    data,
    data_peers,
    feature_peers,
    features,
    growth,
    memory,
    models,
    representation,
    saving,
    saving_peers,
    scale,
    start_peers,
    starting,
    training_peers,
)
from tests.benchmarks.data_peers import S_TOKENS_A_SECOND
from tests.benchmarks.models import Case
from tests.benchmarks.turns import HEAD, Row, best
from tests.launch import run

CPU = torch.device("cpu")
BATCH = 128


def encoding() -> Row:
    """Colors to tokens: the lookup table against Hugging Face's processor."""
    from transformers.models.imagegpt.image_processing_pil_imagegpt import ImageGPTImageProcessorPil

    generator = np.random.default_rng(0)
    palette = generator.uniform(-1, 1, (512, 3)).astype(np.float32)
    images = generator.integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    table = lookup_table(palette)
    processor = ImageGPTImageProcessorPil(clusters=palette, do_resize=False)
    pixels = images.size / 3 / 1e6
    ours, theirs = best(pixels, lambda: encode(images, table), lambda: processor(list(images)))
    return Row("colors to tokens", "Mpixel/s", ours, "ImageGPTImageProcessor", theirs)


def reading(shards: Path) -> Row:
    """Shuffled tokens from the tars: our reader against webdataset with a shuffle buffer."""
    import webdataset as wds

    opened = open_shard_set(shards)
    split = opened.split("train")
    urls = [str(shards / shard["file"]) for shard in opened.manifest["splits"]["train"]["shards"]]

    def read_ours() -> None:
        batches = TrainingBatches(split, opened.resolution, ImageOrder(split.record_images, 0), 0, 1)
        for step in range(split.images // BATCH):
            batches.at(step * BATCH, BATCH)
        batches.close()

    def read_theirs() -> None:
        pipeline = wds.WebDataset(urls, shardshuffle=False).decode().to_tuple("pixels.npy", "labels.npy").unbatched()
        for _ in pipeline.shuffle(1000).batched(BATCH):
            pass

    tokens = split.images * opened.resolution**2 / 1e6
    ours, theirs = best(tokens, read_ours, read_theirs)
    return Row("shuffled batches of 128", "Mtoken/s", ours, "webdataset", theirs)


def data_rates(folder: Path) -> Iterator[str]:
    """Encoding and reading."""
    shards = folder / "shards"
    options = ["--source.kind=photographs", "--resolution", 32, "--out", shards]
    prepared = run(1, "-m", "data_prep", "shards", *options, logs=folder / "logs")
    assert prepared.codes == [0] and (shards / MANIFEST).exists(), prepared.output
    yield HEAD
    yield encoding().line()
    row = reading(shards)
    yield row.line()
    yield (
        f"\nA rank of iGPT-S on one H100 at 45% of its peak takes {S_TOKENS_A_SECOND / 1e6:.2f} Mtoken/s: reading them "
        f"would take {S_TOKENS_A_SECOND / 1e6 / row.ours:.2%} of its time if nothing were read ahead."
    )


def model_rates(_: Path) -> Iterator[str]:
    """Training steps and features, against the same without what we add."""
    from pipeline.distributed import describe_ranks
    from pipeline.train.engine.process_group import start_group

    ranks = describe_ranks()
    start_group(ranks)
    small = ModelConfig(layers=4, width=256, heads=4, resolution=16)
    fp32 = Case(small, 8, "fp32", CPU)
    bf16 = Case(small, 8, "bf16", CPU)
    yield HEAD
    for case in (fp32, bf16):
        what = f"training step, 3.5M parameters, {case.precision}, ZeRO-1"
        yield _row(what, case, models.OurStep(case, ranks), "the same in plain torch", models.plain_step(case))
    case = Case(ModelConfig(layers=8, width=256, heads=4, resolution=16), 8, "fp32", CPU)
    step, forward = models.features(case)
    yield _row("features of all layers, 6.6M parameters", case, step, "the forward pass alone", forward)


def _row(what: str, case: Case, step: models.Step, peer: str, peer_step: models.Step) -> str:
    ours, theirs = best(case.images, step, peer_step)
    return Row(what, "images/s", ours, peer, theirs).line()


def prepared_images(folder: Path) -> Iterator[str]:
    """Images to shards."""
    yield data.HEAD
    yield from data.preparation(folder)


PARTS: dict[str, Callable[[Path], Iterator[str]]] = {
    "data": data_rates,
    "reading": data_peers.reading,
    "resuming": data_peers.resuming,
    "mixtures": data_peers.mixtures,
    "preparing": data_peers.preparing,
    "model": model_rates,
    "starting": starting.table,
    "saving": saving.table,
    "features": features.table,
    "preparation": prepared_images,
    "memory": memory.table,
    "growth": growth.table,
    "scale": lambda _: iter(scale.scale_table()),
    "training": training_peers.table,
    "completions": completion_peers.table,
    "classifiers": feature_peers.table,
    "saves": saving_peers.table,
    "starts": start_peers.table,
    "representation": representation.table,
}
ONLY_BY_NAME = {"representation"}
"""Parts that take longer than all others together."""


def main(wanted: list[str]) -> None:
    """Prints the machine, then the tables; several parts each in a process of its own."""
    unknown = sorted(set(wanted) - PARTS.keys())
    if unknown:
        sys.exit(f"error: {unknown[0]!r} is not a part; the parts are {', '.join(PARTS)}.")
    if len(wanted) == 1:
        run_part(wanted[0])
        return
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers", "webdataset"))
    print(f"{platform.machine()} CPU, one thread; {packages}")
    for name in wanted or [part for part in PARTS if part not in ONLY_BY_NAME]:
        print(f"\n## {name}\n", flush=True)
        subprocess.run([sys.executable, "-m", "tests.benchmarks", name], check=True)


def run_part(name: str) -> None:
    """Prints one part's table."""
    torch.set_num_threads(1)
    began = time.monotonic()
    with TemporaryDirectory() as folder:
        for line in PARTS[name](Path(folder)):
            print(line, flush=True)
    print(f"\n({time.monotonic() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
