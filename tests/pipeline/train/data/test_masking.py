"""The masked objective: the same curve as plain torch on every engine, and masks that are part of the data order."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig

from data_prep.shards.reader import open_shard_set
from pipeline.config import ModelConfig, ScheduleConfig
from pipeline.model.gpt import build_model, initialize
from pipeline.model.gpt_config import gpt2_config
from pipeline.model.masks import Masks
from pipeline.model.objectives import masked_color
from pipeline.model_folder.convert import load_model_folder
from pipeline.schedule import learning_rate_at
from pipeline.train.data.batches import ImageOrder
from pipeline.train.validation import spread
from tests.launch import run
from tests.pipeline.conftest import Runner
from tests.pipeline.train.engine.test_topologies import FP32_TOLERANCE, RATE

MASKED = {"objective__kind": "masked_color", "schedule__steps": 20, "optimizer__learning_rate": RATE}


@pytest.fixture(scope="module")
def plain(shards: Path) -> dict[str, list[float]]:
    """By block: 20 steps of a causal model with an explicit mask that allows all positions, a masked color's embedding
    being zero."""
    return {block: train_plainly(shards, block) for block in ("igpt", "gpt2")}


def train_plainly(shards: Path, block: str) -> list[float]:
    torch.set_num_threads(1)
    model = build_model(gpt2_config(ModelConfig(layers=2, width=32, heads=2, resolution=8, block=block)))
    initialize(model, seed=0)
    split = open_shard_set(shards).split("train")
    order, masks = ImageOrder(split.record_images, seed=0), Masks(seed=0, probability=0.15)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    schedule, losses = ScheduleConfig(steps=20, warmup_steps=4), []
    for step in range(20):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step + 1, RATE, schedule)
        images = split.gather(order.at(step * 8, 8)[0])[0]
        masked = torch.from_numpy(masks.draw("train", np.arange(step * 8, step * 8 + 8), 64))
        colors = torch.from_numpy(images.astype(np.int64))
        embedded = model.transformer.wte(colors) * ~masked[..., None]
        logits = model(inputs_embeds=embedded, attention_mask=torch.zeros(8, 1, 64, 64)).logits[..., :512]
        nats = functional.cross_entropy(logits.transpose(1, 2), colors, reduction="none")
        loss = ((nats * masked).sum(1) / masked.sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("ranks", "block", "settings"),
    [
        pytest.param(1, "igpt", {}, marks=pytest.mark.slow),
        (2, "igpt", {"parallel__zero_stage": 3}),
        (2, "gpt2", {"parallel__pipeline_stages": 2}),
        (2, "igpt", {"parallel__tensor_parallel": 2, "parallel__recompute": True}),
    ],
)
def test_losses_are_those_of_plain_torch(
    runner: Runner, plain: dict[str, list[float]], ranks: int, block: str, settings: dict[str, object]
) -> None:
    runner.check_trains("run", ranks, **MASKED, model__block=block, batch__micro_size=2, **settings)
    assert runner.losses("run") == pytest.approx(plain[block], abs=FP32_TOLERANCE)


@pytest.mark.slow
def test_validation_and_resume_on_another_engine(runner: Runner) -> None:
    """The same images are masked on any ranks, so a run that moves keeps its curve and its validation."""
    runner.check_trains("one", 1, **MASKED, validation__every_steps=5)
    runner.check_trains("moved", 2, **{**MASKED, "schedule__steps": 10}, schedule__decay="constant")
    runner.check_trains("uninterrupted", 2, **MASKED, schedule__decay="constant", validation__every_steps=5)
    stages = {"parallel__pipeline_stages": 2, "batch__micro_size": 2}
    runner.check_trains("moved", 2, **MASKED, schedule__decay="constant", validation__every_steps=5, **stages)
    assert runner.losses("moved") == pytest.approx(runner.losses("uninterrupted"), abs=FP32_TOLERANCE)
    losses = {
        n: [r["valid_loss"] for r in runner.rows(n) if "valid_loss" in r] for n in ("one", "uninterrupted", "moved")
    }
    assert len(losses["one"]) == 4
    assert losses["moved"][-1] == pytest.approx(losses["uninterrupted"][-1], abs=FP32_TOLERANCE)


def test_masks_are_a_function_of_the_place() -> None:
    masks, numbers = Masks(seed=3, probability=0.15), np.arange(1000, 1400)
    masked = masks.draw("train", numbers, 64)
    assert masked.mean() == pytest.approx(0.15, abs=0.01)
    assert masked.any(axis=1).all()
    assert np.array_equal(masks.draw("train", numbers[50:57], 64), masked[50:57])
    assert not np.array_equal(masks.draw("train", numbers + 1, 64)[:1], masked[:1])
    rare = Masks(seed=3, probability=1e-6).draw("train", numbers, 64)
    assert (rare.sum(axis=1) == 1).all()


@pytest.mark.parametrize(
    ("seed", "probability", "part", "first", "packed"),
    [
        (0, 0.15, "train", 0, ["014109004b240209", "62c20002280a0010", "0000800400000728", "0848000400000040"]),
        (3, 0.15, "valid", 1000, ["03441ca280210000", "0058004021004804", "1800005019084000", "0010000208202090"]),
        (7, 0.5, "draw 2", 12345, ["df5b5c124e653268", "d5d5fa3c34abd23b", "aa066fa6dbe4dc46", "2a81568e71d1361e"]),
        (1, 1e-6, "train", 40, ["0000000400000000", "0040000000000000", "0000000020000000", "0000000000000010"]),
    ],
)
def test_masks_are_those_of_earlier_versions(
    seed: int, probability: float, part: str, first: int, packed: list[str]
) -> None:
    """Taken when a masked token was marked by its highest bit: runs and published evaluations must stay as they are."""
    masked = Masks(seed, probability).draw(part, np.arange(first, first + 4), 64)
    assert [np.packbits(image).tobytes().hex() for image in masked] == packed


def test_its_model_folder_is_ours_alone(runner: Runner) -> None:
    """transformers would read it as a causal model: it must reject it, and we must read it."""
    runner.check_trains("run", 1, **{**MASKED, "schedule__steps": 10})
    folder = runner.folder / "model"
    finished = run(1, "-m", "pipeline", "export", runner.folder / "run", "--out", folder, logs=runner.folder / "export")
    assert finished.codes == [0], finished.output
    with pytest.raises(ValueError, match="image_gpt_masked"):
        AutoConfig.from_pretrained(folder)
    loaded = load_model_folder(folder)
    assert loaded.mask_probability == 0.15
    split, masks = open_shard_set(runner.shards).split("valid"), Masks(0, 0.15)
    chosen = spread(split.images, 33)
    tokens = torch.from_numpy(split.gather(chosen)[0].astype(np.int64))
    inputs, targets = masked_color(tokens, torch.from_numpy(masks.draw("valid", chosen, 64)), 512)
    with torch.no_grad():
        logits = loaded.model(inputs).logits
        later = inputs.clone()
        later[:, -1] = 0
        assert not torch.equal(loaded.model(later).logits[:, 0], logits[:, 0])  # it sees what comes after
    loss = torch.stack([functional.cross_entropy(*of) for of in zip(logits, targets, strict=True)]).mean().item()
    validation = [row["valid_loss"] for row in runner.rows("run") if "valid_loss" in row]
    assert loss == pytest.approx(validation[-1], abs=1e-5)
