"""How long a save stops training, beside other libraries: make bench PARTS=saves

iGPT-S (76M parameters, with Adam's moments 0.92 GB) at 16x16 on one rank in fp32, batch 1. A turn is a training step
and a save. The stall is the time until the loop continues; ours and async_save write in a thread meanwhile.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.config import SIZES, ModelConfig
from pipeline.costs import STATE_BYTES, parameter_count
from pipeline.model.gpt_config import gpt2_config
from tests.benchmarks.marks import Result, result
from tests.benchmarks.peers.measure import HEAD, SLOW_TURNS, Script, compare, lines_of
from tests.benchmarks.peers.training.work import Work
from tests.benchmarks.training_peers import PEERS, shard_set
from tests.benchmarks.turns import best

RESOLUTION = 16


def small(folder: Path) -> Work:
    """iGPT-S at 16x16, a step a turn."""
    shards, tokens = shard_set(folder, RESOLUTION)
    return Work(
        **SIZES["s"]._asdict(),
        positions=RESOLUTION**2,
        images=1,
        precision="fp32",
        compiled=False,
        steps=1,
        shards=str(shards),
        tokens=str(tokens),
        folder=str(folder),
    )


def scripts(work: Work) -> list[Script]:
    """Ours first."""
    argument = work.to_argument()
    return [
        Script("ours", f"{PEERS}.ours", (argument,)),
        Script("HF Trainer", f"{PEERS}.hf_trainer", (argument,)),
        Script("torch.distributed.checkpoint.async_save", f"{PEERS}.with_checkpoint", (argument,)),
    ]


def rates(folder: Path, size: int) -> tuple[float, float]:
    """Bytes a second of a copy in memory, and of writing a file until it is on disk."""
    content = np.ones(size // 4, np.float32)
    target = np.empty_like(content)
    [copying] = best(content.nbytes, lambda: np.copyto(target, content))
    began = time.perf_counter()
    with (folder / "written").open("wb") as file:
        file.write(content.data)
        file.flush()
        os.fsync(file.fileno())
    return copying, content.nbytes / (time.perf_counter() - began)


def table(folder: Path) -> Iterator[str | Result]:
    """A line for each peer: the stall, and the seconds until the checkpoint is on disk; then what hardware allows."""
    measured = compare(*scripts(small(folder)), turns=SLOW_TURNS)
    stall, written = "save of 76M parameters: training stops", "save of 76M parameters: until it is written"
    yield HEAD
    yield from lines_of(stall, "s", measured, "stall")
    yield from lines_of(written, "s", measured, "saving")
    size = STATE_BYTES * parameter_count(gpt2_config(ModelConfig(size="s", resolution=RESOLUTION)))
    copying, writing = rates(folder, size)
    yield f"\nIn seconds less is better. A save has {size / 1e9:.2f} GB."
    limits = {"limit": size / copying, "limited_by": "copying it in memory"}
    yield result(stall, "s", measured, "stall", mark=1, more_is_better=False, **limits)
    limits = {"limit": size / writing, "limited_by": "writing and syncing one file"}
    yield result(written, "s", measured, "saving", mark=None, more_is_better=False, **limits)
