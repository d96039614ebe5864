"""Twenty steps on every topology, both blocks and both objectives, against plain torch: losses, norms, validation."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from data_prep.shards.reader import Split, open_shard_set
from pipeline.config import ModelConfig, ScheduleConfig
from pipeline.model.gpt import build_model, initialize
from pipeline.model.gpt_config import gpt2_config
from pipeline.model.masks import Masks
from pipeline.schedule import learning_rate_at
from pipeline.train.data.batches import ImageOrder
from tests.launch import run
from tests.pipeline.conftest import Runner
from tests.pipeline.train.engine.test_topologies import BF16_TOLERANCE, FP32_TOLERANCE

STEPS, IMAGES, HELD_OUT = 20, 8, 13
"""Steps of a run, images of a step, and images of a validation: one of two ranks has one image less."""
RATE = 0.0015
"""At twice this rate plain torch's own curve (gpt2, 4 heads) moves by 1.5e-5 if its initial weights move by 1e-7."""
NORM_TOLERANCE = 1e-4
"""Relative."""
TOPOLOGIES = {  # ranks, ZeRO stage, pipeline stages, tensor parallelism, sequence parallelism
    "1 rank": (1, 1, 1, 1, True),
    "Z1x2": (2, 1, 1, 1, True),
    "Z2x2": (2, 2, 1, 1, True),
    "Z3x2": (2, 3, 1, 1, True),
    "PP2": (2, 1, 2, 1, True),
    "PP4": (4, 1, 4, 1, True),
    "PP2xDP2": (4, 1, 2, 1, True),
    "tp2": (2, 1, 1, 2, True),
    "tp2, complete positions": (2, 2, 1, 2, False),
    "tp4": (4, 1, 1, 4, True),
    "tp4, complete positions": (4, 1, 1, 4, False),
    "tp2xDP2": (4, 2, 1, 2, True),
    "tp2xDP2, complete positions": (4, 1, 1, 2, False),
    "tp2xPP2": (4, 1, 2, 2, True),
    "tp2xPP2, complete positions": (4, 1, 2, 2, False),
    "tp2xPP2xDP2": (8, 1, 2, 2, True),
    "tp2xPP2xDP2, complete positions": (8, 1, 2, 2, False),
}
HEADS = {parts: max(parts, 2) for *_, parts, _ in TOPOLOGIES.values()}
"""Heads of 16 dimensions, by tensor parallelism."""
KINDS = [(block, objective) for block in ("igpt", "gpt2") for objective in ("next_color", "masked_color")]


@dataclass
class Curve:
    """What a run recorded."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)


class PlainModel:
    """A model of the tests' size in torch alone. A masked one has an explicit mask that allows all positions; the
    embedding of a masked color is zero."""

    def __init__(self, shards: Path, block: str, objective: str, heads: int) -> None:
        shape = ModelConfig(layers=4, width=16 * heads, heads=heads, resolution=8, block=block)  # type: ignore[arg-type]
        self.model = build_model(gpt2_config(shape))
        initialize(self.model, seed=0)
        self.shards, self.masked = open_shard_set(shards), objective == "masked_color"

    def image_nats(self, split: Split, name: str, images: np.ndarray, places: np.ndarray) -> torch.Tensor:
        """Mean nats of each image's predicted colors: (B,)."""
        colors = torch.from_numpy(split.gather(images)[0].astype(np.int64))  # (B, T)
        if self.masked:
            masked = torch.from_numpy(Masks(seed=0, probability=0.15).draw(name, places, 64))
            embedded = self.model.transformer.wte(colors) * ~masked[..., None]
            mask = torch.zeros(len(colors), 1, 64, 64)
            logits = self.model(inputs_embeds=embedded, attention_mask=mask).logits[..., :512]
            nats = functional.cross_entropy(logits.transpose(1, 2), colors, reduction="none")
            return (nats * masked).sum(1) / masked.sum(1)
        inputs = torch.cat([torch.full((len(colors), 1), 512), colors[:, :-1]], dim=1)
        logits = self.model(inputs).logits[..., :512]
        return functional.cross_entropy(logits.transpose(1, 2), colors, reduction="none").mean(1)

    def train(self) -> Curve:
        """AdamW with clipping."""
        torch.set_num_threads(1)
        curve, split = Curve(), self.shards.split("train")
        order = ImageOrder(split.record_images, seed=0)
        optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
        for step in range(STEPS):
            rate = learning_rate_at(step + 1, RATE, ScheduleConfig(steps=STEPS, warmup_steps=4))
            optimizer.param_groups[0]["lr"] = rate
            places = np.arange(step * IMAGES, (step + 1) * IMAGES)
            loss = self.image_nats(split, "train", order.at(places[0], IMAGES)[0], places).mean()
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            curve.losses.append(loss.item())
            curve.norms.append(norm.item())
            if (step + 1) % 10 == 0:
                curve.validation.append(self.validate())
        return curve

    def validate(self) -> float:
        """Over images spread evenly over the held-out ones."""
        split = self.shards.split("valid")
        chosen = np.arange(HELD_OUT) * split.images // HELD_OUT
        with torch.no_grad():
            return self.image_nats(split, "valid", chosen, chosen).mean().item()


@pytest.fixture(scope="module")
def plain(shards: Path) -> dict[tuple[str, str, int], Curve]:
    """By block, objective and heads."""
    heads = sorted(set(HEADS.values()))
    return {(*kind, number): PlainModel(shards, *kind, number).train() for kind in KINDS for number in heads}


def arguments(runner: Runner, topology: str, block: str, objective: str, precision: str) -> list[str]:
    """Of `train`."""
    _, zero_stage, stages, parts, sequence = TOPOLOGIES[topology]
    settings = {"model__layers": 4, "model__width": 16 * HEADS[parts], "model__heads": HEADS[parts]}
    settings |= {"model__block": block, "objective__kind": objective, "precision": precision}
    settings |= {"optimizer__learning_rate": RATE, "schedule__steps": STEPS, "batch__micro_size": 2}
    settings |= {"validation__every_steps": 10, "validation__images": HELD_OUT, "checkpoint__every_steps": STEPS}
    settings |= {"parallel__zero_stage": zero_stage, "parallel__pipeline_stages": stages}
    settings |= {"parallel__tensor_parallel": parts, "parallel__sequence_parallel": sequence}
    return runner.arguments(f"{block} {objective} {precision}", **settings)[3:]


def curve_of(runner: Runner, name: str) -> Curve:
    """The curve in metrics.jsonl."""
    rows, keys = runner.rows(name), ("loss", "grad_norm", "valid_loss")
    return Curve(*([row[key] for row in rows if key in row] for key in keys))


def furthest(curve: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(curve, other, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_every_topology_is_as_plain_torch(
    runner: Runner, plain: dict[tuple[str, str, int], Curve], topology: str, tmp_path: Path
) -> None:
    runs = [*((*kind, "fp32") for kind in KINDS), (*KINDS[0], "bf16")]
    (tmp_path / "runs.json").write_text(json.dumps([arguments(runner, topology, *kind) for kind in runs]))
    ranks = TOPOLOGIES[topology][0]
    finished = run(
        ranks, "-m", "tests.pipeline.train.several_runs", tmp_path / "runs.json", logs=tmp_path / "logs", seconds=1800
    )
    assert finished.codes == [0] * ranks, "\n".join(finished.outputs)
    print()
    for block, objective, precision in runs:
        heads = HEADS[TOPOLOGIES[topology][3]]
        expected, found = plain[block, objective, heads], curve_of(runner, f"{block} {objective} {precision}")
        assert (len(found.losses), len(found.validation)) == (STEPS, 2)
        assert max(found.losses) - min(found.losses) > 100 * FP32_TOLERANCE  # it moves
        loss, validation = furthest(found.losses, expected.losses), furthest(found.validation, expected.validation)
        norm = max(abs(a / b - 1) for a, b in zip(found.norms, expected.norms, strict=True))
        words = f"{topology:8} {block} {objective:12} {precision}"
        print(f"{words}: loss {loss:.1e}, validation {validation:.1e}, norm {norm:.1e} relative")
        tolerance = FP32_TOLERANCE if precision == "fp32" else BF16_TOLERANCE
        assert loss <= tolerance, words
        assert validation <= tolerance, words
        if precision == "fp32":
            assert norm <= NORM_TOLERANCE, words
