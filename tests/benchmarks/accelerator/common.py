"""What the parts share: the device, toy sizes, a case of each size, the process group, a small shard set."""

import gc
import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

from data_prep.common.files import write_json
from data_prep.palette.codec import palette_sha256
from data_prep.shards.format import FORMAT, MANIFEST, PALETTE, VERSION, shard_name
from data_prep.shards.writer import open_shard
from pipeline.config import ModelConfig
from pipeline.distributed import Ranks, describe_ranks
from pipeline.model import attention
from tests.benchmarks.models import COLORS, Case, attention_seconds

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA = DEVICE.type == "cuda"
TOY = os.environ.get("BENCHMARK_TOY") == "1"
TURNS = 1 if TOY else 5
OUT = Path(os.environ.get("BENCHMARK_OUT", "out/accelerator"))


def case_of(size: str, **changes: object) -> Case:
    """A published size with a micro-batch that should fit 80 GB; XL's width at 64x64 with as many layers as do."""
    if TOY:
        small = {"xl": 8}.get(size, 4)
        return replace(Case(ModelConfig(layers=2, width=32, heads=2, resolution=small), 2, "bf16", DEVICE), **changes)  # type: ignore[arg-type]
    images = {"s": 64, "m": 32, "l": 16, "xl": 2}[size]
    model = ModelConfig(size=size, resolution=32)
    if size == "xl":
        model = ModelConfig(layers=12, width=3072, heads=24, resolution=64)
    return replace(Case(model, images, "bf16", DEVICE, compiled=True), **changes)  # type: ignore[arg-type]


@cache
def start_alone() -> Ranks:
    """The process group of one rank."""
    from pipeline.train.engine.process_group import start_group

    ranks = describe_ranks()
    start_group(ranks)
    return ranks


def free_memory() -> None:
    """Engines lie in cycles: what is left of the one before would take the next one's memory."""
    gc.collect()
    torch._dynamo.reset()
    if CUDA:
        torch.cuda.empty_cache()


def synchronize() -> None:
    """Waits for the device."""
    if CUDA:
        torch.cuda.synchronize()


def use_fastest_attention(case: Case) -> dict[str, float]:
    """As a run of ours does; the peers of the process have it too. Returns seconds by kernel."""
    seconds = attention_seconds(case)
    attention.use_fastest(seconds)
    return seconds


def write_shards(folder: Path, images: int, resolution: int) -> Path:
    """A shard set of images that can be learned, a color each with noise: train, valid and test, in two classes."""
    draw = np.random.default_rng(0)
    palette = draw.uniform(-1, 1, (COLORS, 3)).astype(np.float32)
    folder.mkdir(parents=True)
    np.save(folder / PALETTE, palette)
    splits = {}
    for split in ("train", "valid", "test"):
        with open_shard(folder / shard_name(split, 0)) as writer:
            for first in range(0, images, 256):
                count = min(256, images - first)
                base = draw.integers(0, COLORS - 4, (count, 1))
                tokens = base + draw.integers(0, 4, (count, resolution**2))
                writer.add((tokens.astype(np.uint16), (base[:, 0] % 2).astype(np.int32)))
        splits[split] = {"images": images, "shards": [writer.entry]}
    write_json(
        folder / MANIFEST,
        {
            "format": FORMAT,
            "version": VERSION,
            "source": {"name": "noise"},
            "classes": ["even", "odd"],
            "resolution": resolution,
            "palette": {"colors": COLORS, "sha256": palette_sha256(palette)},
            "splits": splits,
        },
    )
    return folder
