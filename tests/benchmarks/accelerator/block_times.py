"""Times of single blocks, which `plan --block_times` reads."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch

from pipeline.model import objectives
from pipeline.model.trunk import block_and_norm
from pipeline.plan.block_times import BlockTime, BlockTimes
from pipeline.train.engine.compilation import compiled
from tests.benchmarks import models
from tests.benchmarks.accelerator.common import (
    CUDA,
    DEVICE,
    OUT,
    TOY,
    TURNS,
    case_of,
    free_memory,
    use_fastest_attention,
)
from tests.benchmarks.accelerator.report import Row, known
from tests.benchmarks.models import Case
from tests.benchmarks.turns import best

FILE = "block_times.json"


def block_times() -> Iterator[Row | str]:
    """A block of each size; writes the file after each."""
    name = torch.cuda.get_device_name() if CUDA else "CPU"
    yield "\n| one block, bf16 | forward, ms | backward, ms |\n|---|---|---|"
    rows: list[BlockTime] = []
    for size in ("s", "m", "l", "xl"):
        free_memory()
        case = case_of(size)
        use_fastest_attention(case)
        row = _block_time(case)
        rows.append(row)
        (OUT / FILE).write_text(json.dumps(asdict(BlockTimes(name, tuple(rows))), indent=1))
        shape = f"width {row.width}, {row.positions} positions, {row.images} images"
        yield f"| {shape} | {1000 * row.forward_seconds:.2f} | {1000 * row.backward_seconds:.2f} |"
        both = f"{1000 * row.forward_seconds:.2f} + {1000 * row.backward_seconds:.2f}"
        yield known(f"blocks: {size}, ms forward and backward", both)


def _block_time(case: Case) -> BlockTime:
    config = case.config
    config.n_layer = 1
    model = models.drawn_model(case, config).bfloat16()
    block, head = model.transformer.h[0], torch.nn.Sequential(model.transformer.ln_f, model.lm_head)
    run = compiled(block_and_norm) if case.compiled else block_and_norm
    size = (case.images, config.n_positions, config.n_embd)
    states, normed = (torch.randn(size, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    targets = torch.from_numpy(case.tokens().astype("int64")).to(DEVICE)
    forward, both = _passes(lambda: sum(part.sum() for part in run(block, block.ln_1, states, normed)))
    head_forward, head_both = _passes(lambda: objectives.image_loss(head(states), targets, models.COLORS).mean())
    weights = torch.randn(1 << (16 if TOY else 27), device=DEVICE, requires_grad=True)
    weights.grad = torch.randn_like(weights)
    optimizer = torch.optim.AdamW([weights], fused=True)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_([weights], 1.0)
        optimizer.step()

    [updates] = best(len(weights), update, turns=TURNS)
    return BlockTime(
        config.n_embd, config.n_head, config.n_positions, case.images,
        forward, max(both - forward, 1e-9), head_forward, max(head_both - head_forward, 1e-9), 1 / updates,
    )  # fmt: skip


def _passes(loss: Callable[[], torch.Tensor]) -> tuple[float, float]:
    """Seconds of the forward pass, and of both."""
    forward, both = best(1, loss, lambda: loss().backward(), turns=TURNS)
    return 1 / forward, 1 / both
