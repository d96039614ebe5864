"""The peak memory of real runs on CPU against what `plan` says: python -m tests.benchmarks.memory

Of each rank the peak of its resident memory over two steps, less what the process had before the engine was built. The
C library is told to give freed tensors back, as an accelerator's allocator counts them. The second table has what
two images more add to the peak, by tensor parallelism: activations alone.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from pipeline.config import BatchConfig, ModelConfig, ParallelConfig, TrainConfig
from pipeline.model.gpt_config import gpt2_config
from pipeline.plan.memory import memory_of_rank
from tests.launch import run

S = {"layers": 24, "width": 512, "heads": 8}
HALF = {"layers": 12, "width": 256, "heads": 4}
CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("S 16x16, fp32, ZeRO-1, 1 rank", 1, {"model": {**S, "resolution": 16}, "images": 2}),
    (
        "S 16x16, fp32, ZeRO-2, 2 ranks",
        2,
        {"model": {**S, "resolution": 16}, "parallel": {"zero_stage": 2}, "images": 2},
    ),
    ("S 16x16, bf16, ZeRO-1, 2 ranks", 2, {"model": {**S, "resolution": 16}, "precision": "bf16", "images": 2}),
    (
        "S 16x16, bf16, ZeRO-2, 2 ranks",
        2,
        {"model": {**S, "resolution": 16}, "precision": "bf16", "parallel": {"zero_stage": 2}, "images": 2},
    ),
    (
        "S 16x16, bf16, ZeRO-3, 2 ranks",
        2,
        {"model": {**S, "resolution": 16}, "precision": "bf16", "parallel": {"zero_stage": 3}, "images": 2},
    ),
    (
        "S 16x16, bf16, tensor parallel 2",
        2,
        {"model": {**S, "resolution": 16}, "precision": "bf16", "parallel": {"tensor_parallel": 2}, "images": 2},
    ),
    ("12 x 256 32x32, fp32, 4 images", 1, {"model": {**HALF, "resolution": 32}, "images": 4}),
    (
        "12 x 256 32x32, fp32, 4 images, recompute",
        1,
        {"model": {**HALF, "resolution": 32}, "images": 4, "parallel": {"recompute": True}},
    ),
    ("12 x 256 32x32, bf16, 4 images", 1, {"model": {**HALF, "resolution": 32}, "images": 4, "precision": "bf16"}),
    (
        "12 x 256 32x32, gpt2 block, fp32, 4 images",
        1,
        {"model": {**HALF, "resolution": 32, "block": "gpt2"}, "images": 4},
    ),
    (
        "12 x 256 32x32, bf16, 2 stages, 2 x 4 images",
        2,
        {
            "model": {**HALF, "resolution": 32},
            "images": 2,
            "micro_batches": 4,
            "precision": "bf16",
            "parallel": {"pipeline_stages": 2},
        },
    ),
]

TENSOR_SIZES = (1, 2, 4)
FEW, MORE = 1, 3
"""Images of a micro-batch."""


def config_of(case: dict[str, Any], ranks: int) -> TrainConfig:
    """The run of a case; `images` is the micro-batch."""
    parallel = ParallelConfig(**case.get("parallel", {}))
    size = case["images"] * case.get("micro_batches", 1) * parallel.data_ranks(ranks)
    return TrainConfig(
        model=ModelConfig(**case["model"]),
        batch=BatchConfig(global_size=size, micro_size=case["images"]),
        parallel=parallel,
        precision=case.get("precision", "fp32"),
    )


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def measure(case: dict[str, Any]) -> None:
    """In a rank: prints the bytes that two steps took at their peak."""
    from pipeline.distributed import describe_ranks
    from pipeline.model.masks import Batch
    from pipeline.train.engine.build import build_engine
    from pipeline.train.engine.process_group import start_group

    ranks = describe_ranks()
    config = config_of(case, ranks.count)
    model = gpt2_config(config.model)
    start_group(ranks)
    import pipeline.train.engine.pipeline
    import pipeline.train.engine.zero  # noqa: F401

    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    engine = build_engine(config, model, ranks)
    draw = np.random.default_rng(ranks.rank // config.parallel.model_ranks)
    share = (config.batch.global_size // engine.data_ranks, model.n_positions)
    for _ in range(2):
        engine.step(Batch(draw.integers(0, 512, share).astype(np.uint16)), 1e-3)
    print(f"BYTES {_status('VmHWM') - before}", flush=True)
    os._exit(0)


def table(folder: Path) -> Iterator[str]:
    """Both tables."""
    yield from runs_table(folder)
    yield ""
    yield from activations_table(folder)


def runs_table(folder: Path) -> Iterator[str]:
    """Lines."""
    yield "| run | plan, MB | measured, MB | difference |"
    yield "|---|---|---|---|"
    for name, ranks, case in CASES:
        yield _line(name, *peaks(ranks, case, folder))


def activations_table(folder: Path) -> Iterator[str]:
    """Lines."""
    yield "| activations of two images, fp32, sequence parallelism | plan, MB | measured, MB | difference |"
    yield "|---|---|---|---|"
    for parts in TENSOR_SIZES:
        case = {"model": {**HALF, "resolution": 32}, "parallel": {"tensor_parallel": parts}}
        few, more = (peaks(parts, {**case, "images": images}, folder) for images in (FEW, MORE))
        yield _line(f"12 x 256 32x32, tensor parallel {parts}", more[0] - few[0], more[1] - few[1])


def _line(name: str, planned: float, measured: float) -> str:
    return f"| {name} | {planned / 1e6:,.0f} | {measured / 1e6:,.0f} | {planned / measured - 1:+.1%} |"


def peaks(ranks: int, case: dict[str, Any], folder: Path) -> tuple[float, int]:
    """Bytes of the rank that needs the most: as planned, and as measured."""
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    config = config_of(case, ranks)
    planned = memory_of_rank(config, gpt2_config(config.model), ranks, on_cpu=True).peak
    done = run(ranks, "-m", "tests.benchmarks.memory", json.dumps(case), logs=folder)
    found = [line for text in done.outputs for line in text.splitlines() if line.startswith("BYTES")]
    if len(found) != ranks:
        sys.exit(done.output)
    return planned, max(int(line.split()[1]) for line in found)


def main() -> None:
    """Both tables."""
    with TemporaryDirectory() as folder:
        for line in table(Path(folder)):
            print(line, flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(json.loads(sys.argv[1]))
    else:
        main()
