"""Training steps beside the libraries that a user would pick: make bench PARTS=training

Each trains a model of the same size on the same images: ours by the loop of `pipeline train`, and transformers by its
Trainer, with their own reading, logging of every step and checkpoints; litgpt and x-transformers in the loops of their
documentation. All are compiled where they compile. A turn is a few steps and ends with a save, which counts as one in
500 steps.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from data_prep.shards.reader import open_shard_set
from pipeline.config import ModelConfig
from pipeline.costs import flops_per_token, measured_matmul_peak
from pipeline.model.gpt_config import gpt2_config
from pipeline.model.numerics import bf16_is_slow
from tests.benchmarks.marks import Result, result
from tests.benchmarks.peers.measure import HEAD, Measured, Script, compare, lines_of
from tests.benchmarks.peers.training.work import SAVE_EVERY, Work
from tests.launch import run

SIZE = {"layers": 2, "width": 256, "heads": 4}
IMAGES = {16: 8, 32: 2}
"""Resolution: images of a batch. Both have 2,048 tokens."""
STEPS = 2
"""Of a turn."""
MARK = 1.25
"""Times the best peer."""
PEERS = "tests.benchmarks.peers.training"


def works(folder: Path) -> Iterator[Work]:
    """T = 256 and 1,024, in fp32 and, if torch has fast kernels for it, bf16."""
    precisions = ("fp32",) if bf16_is_slow(torch.device("cpu")) else ("fp32", "bf16")
    for resolution, images in IMAGES.items():
        shards, tokens = shard_set(folder, resolution)
        for precision in precisions:
            own = folder / f"{resolution}-{precision}"
            own.mkdir()
            yield Work(
                **SIZE,
                positions=resolution**2,
                images=images,
                precision=precision,
                compiled=True,
                steps=STEPS,
                shards=str(shards),
                tokens=str(tokens),
                folder=str(own),
            )


def shard_set(folder: Path, resolution: int) -> tuple[Path, Path]:
    """The demo's images as a shard set, and the tokens of its training images as an .npy file for the peers."""
    shards, tokens = folder / f"shards-{resolution}", folder / f"tokens-{resolution}.npy"
    options = ["--config", "configs/data/demo.yaml", "--resolution", resolution]
    options += ["--source.equalized_side", resolution, "--out", shards]
    done = run(1, "-m", "data_prep", "shards", *options, logs=folder / "logs")
    assert done.codes == [0], done.output
    split = open_shard_set(shards).split("train")
    np.save(tokens, split.gather(np.arange(split.images))[0])
    return shards, tokens


def scripts(work: Work) -> list[Script]:
    """Ours first."""
    argument = work.to_argument()
    return [
        Script("ours", f"{PEERS}.ours", (argument,)),
        Script("HF Trainer, ImageGPT, compiled", f"{PEERS}.hf_trainer", (argument,)),
        Script("litgpt, compiled", f"{PEERS}.litgpt_pretrain", (argument,), environment="litgpt"),
        Script("x-transformers, compiled", f"{PEERS}.with_xtransformers", (argument,), environment="x-transformers"),
    ]


def add_rates(measured: Sequence[Measured]) -> None:
    """The figure `rate`: images a second, with a save in SAVE_EVERY steps."""
    for one in measured:
        figures = one.turns
        if one.error is None:
            share = STEPS / SAVE_EVERY
            turns = zip(figures["work"], figures["seconds"], figures["saving"], strict=True)
            figures["rate"] = [work / (seconds - (1 - share) * saving) for work, seconds, saving in turns]


def floor(work: Work) -> float:
    """Images a second if matrix products at their measured rate were all: attention counted as causal."""
    config = gpt2_config(ModelConfig(**SIZE, resolution=int(work.positions**0.5)))
    masked_half = 6 * config.n_layer * config.n_positions * config.n_embd
    flops = (flops_per_token(config) - masked_half) * config.n_positions
    dtype = torch.float32 if work.precision == "fp32" else torch.bfloat16
    return measured_matmul_peak(dtype, torch.device(work.device)) / flops


def table(folder: Path) -> Iterator[str | Result]:
    """A line for each peer and case; then ours against the mark, and against what matrix products alone would allow."""
    yield HEAD
    results = []
    for work in works(folder):
        measured = compare(*scripts(work))
        add_rates(measured)
        what = f"training step, 2 blocks of width 256, T = {work.positions}, {work.images} images, {work.precision}"
        yield from lines_of(what, "images/s", measured, "rate", more_is_better=True)
        limits = {"limit": floor(work), "limited_by": "its matrix products"}
        results.append(result(what, "images/s", measured, mark=MARK, **limits))
    yield "\nThe rate of matrix products is that of a large one, measured on this machine."
    if bf16_is_slow(torch.device("cpu")):
        yield "bf16 is not measured: torch has no fast kernels for it on this processor."
    yield from results
