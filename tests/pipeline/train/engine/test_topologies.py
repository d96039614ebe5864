"""The same run on other ranks, ZeRO stages and accumulations; and against a plain torch loop without DeepSpeed."""

from collections.abc import Callable, Sequence
from math import log
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from data_prep.shards.reader import open_shard_set
from pipeline.config import ModelConfig, ScheduleConfig
from pipeline.model.gpt import build_model, initialize
from pipeline.model.gpt_config import gpt2_config
from pipeline.schedule import learning_rate_at
from pipeline.train.data.batches import ImageOrder
from tests.pipeline.conftest import Runner

RATE = 0.003
FP32_TOLERANCE = 1e-5
BF16_TOLERANCE = 2e-2


def train_plainly(
    shards: Path,
    clip_norm: float = 1.0,
    weight_decay: float = 0.0,
    sizes: Sequence[int] = (8,) * 40,
    decay: Literal["cosine", "constant"] = "cosine",
    after_step: Callable[[nn.Module], None] = lambda model: None,
) -> list[float]:
    """The losses of 40 steps of AdamW with clipping, written with torch alone; sizes: images of each step."""
    torch.set_num_threads(1)
    model = build_model(gpt2_config(ModelConfig(layers=2, width=32, heads=2, resolution=8)))
    initialize(model, seed=0)
    split = open_shard_set(shards).split("train")
    order = ImageOrder(split.record_images, seed=0)
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and ".wte." not in n and ".wpe." not in n]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    schedule = ScheduleConfig(steps=40, warmup_steps=4, decay=decay)
    losses, seen = [], 0
    for step, size in enumerate(sizes):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step + 1, RATE, schedule)
        tokens = torch.from_numpy(split.gather(order.at(seen, size)[0])[0].astype(np.int64))
        seen += size
        inputs = torch.cat([torch.full((size, 1), 512), tokens[:, :-1]], dim=1)
        loss = functional.cross_entropy(model(inputs).logits.reshape(-1, 512), tokens.reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        after_step(model)
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def plain_losses(shards: Path) -> list[float]:
    """The plain loop with the tests' settings."""
    return train_plainly(shards)


@pytest.mark.parametrize(
    ("ranks", "stage", "micro_size", "recompute"),
    [(1, 0, 8, False), (1, 1, 2, False), (2, 0, 4, False), (2, 1, 4, False), (2, 2, 2, True), (2, 3, 4, False)],
)
def test_fp32_losses_are_those_of_plain_torch(
    runner: Runner, plain_losses: list[float], ranks: int, stage: int, micro_size: int, recompute: bool
) -> None:
    finished = runner.train(
        "run",
        ranks,
        optimizer__learning_rate=RATE,
        parallel__zero_stage=stage,
        batch__micro_size=micro_size,
        parallel__recompute=recompute,
    )
    assert finished.codes == [0] * ranks, "\n".join(finished.outputs)
    losses = runner.losses("run")
    assert losses[0] == pytest.approx(log(512), abs=1e-6)
    assert losses == pytest.approx(plain_losses, abs=FP32_TOLERANCE)
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize(
    ("ranks", "stage"),
    [pytest.param(1, 0, marks=pytest.mark.slow), (2, 1), pytest.param(2, 2, marks=pytest.mark.slow), (2, 3)],
)
def test_bf16_losses_stay_near(runner: Runner, plain_losses: list[float], ranks: int, stage: int) -> None:
    finished = runner.train(
        "run",
        ranks,
        optimizer__learning_rate=RATE,
        parallel__zero_stage=stage,
        precision="bf16",
        samples__every_steps=40,
    )
    assert finished.codes == [0] * ranks, "\n".join(finished.outputs)
    assert runner.losses("run") == pytest.approx(plain_losses, abs=BF16_TOLERANCE)


@pytest.mark.parametrize(
    ("ranks", "stage", "micro_size", "clip_norm", "decay"),
    [(1, 0, 2, 0.05, 0.0), (1, 1, 8, 0.0, 2.0), (2, 3, 4, 0.05, 2.0)],
)
def test_clipping_and_weight_decay_are_those_of_plain_torch(
    runner: Runner,
    plain_losses: list[float],
    ranks: int,
    stage: int,
    micro_size: int,
    clip_norm: float,
    decay: float,
) -> None:
    finished = runner.train(
        "run",
        ranks,
        optimizer__learning_rate=RATE,
        optimizer__clip_norm=clip_norm,
        optimizer__weight_decay=decay,
        parallel__zero_stage=stage,
        batch__micro_size=micro_size,
    )
    assert finished.codes == [0] * ranks, "\n".join(finished.outputs)
    expected = train_plainly(runner.shards, clip_norm, decay)
    assert runner.losses("run") == pytest.approx(expected, abs=FP32_TOLERANCE)
    assert max(abs(a - b) for a, b in zip(expected, plain_losses, strict=True)) > 100 * FP32_TOLERANCE


@pytest.mark.parametrize("block", ["igpt", "gpt2"])
def test_the_validation_loss_does_not_depend_on_the_ranks(runner: Runner, block: str) -> None:
    for ranks, stage in [(1, 1), (2, 3)]:
        finished = runner.train(
            f"run-{ranks}", ranks, parallel__zero_stage=stage, model__block=block, schedule__steps=20
        )
        assert finished.codes == [0] * ranks, "\n".join(finished.outputs)
    alone, together = ([row for row in runner.rows(f"run-{ranks}") if "valid_loss" in row] for ranks in (1, 2))
    assert [row["step"] for row in alone] == [20]
    assert alone[0]["valid_loss"] == pytest.approx(together[0]["valid_loss"], abs=FP32_TOLERANCE)
    assert runner.losses("run-1")[0] == pytest.approx(log(512), abs=1e-6)
