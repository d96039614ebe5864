"""Run folders of a known scaling law, in the format that `train` writes."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from data_prep.common.files import write_json
from pipeline import costs
from pipeline.checkpoint.metrics_log import to_line
from pipeline.config import DataConfig, ModelConfig, ObjectiveConfig, TrainConfig, ValidationConfig, to_dict
from pipeline.layout import BatchConfig
from pipeline.model.gpt_config import gpt2_config
from pipeline.scaling.law import Law
from pipeline.schedule import ScheduleConfig, learning_rate_at

TRUE = Law(E=2.0, A=12.0, B=60.0, alpha=0.28, beta=0.34)
SHAPES = ((2, 32), (2, 64), (4, 64), (4, 128), (8, 128), (8, 256), (12, 384))
"""Layers and widths: 0.08M to 21.8M parameters."""
BATCH, WARMUP = 64, 20


def config_of(layers: int, width: int, steps: int, decay: str = "cosine", **changed: Any) -> TrainConfig:
    """A run of `steps` steps of 64 images; wsd decays over its last tenth."""
    model = ModelConfig(layers=layers, width=width, heads=max(1, width // 64), resolution=16)
    schedule = ScheduleConfig(
        steps=steps, warmup_steps=WARMUP, decay=decay, decay_steps=steps // 10 if decay == "wsd" else None
    )
    config = TrainConfig(
        model=model, schedule=schedule, objective=ObjectiveConfig(), data=DataConfig(shards="shards"),
        batch=BatchConfig(global_size=BATCH, micro_size=BATCH), validation=ValidationConfig(every_steps=steps // 20),
    )  # fmt: skip
    return replace(config, **changed)


def parameters_of(config: TrainConfig) -> int:
    return costs.parameter_count(gpt2_config(config.model, 512, config.objective.kind))


def write_run(
    folder: Path, config: TrainConfig, noise: float = 0.0, seed: int = 0, last: int | None = None, law: Law = TRUE
) -> Path:
    """A run whose validation losses are the law's, with errors of log L of this standard deviation.

    last: the step that it has reached; by default its end. Losses of decaying runs are the law's at their end, and
    higher before.
    """
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    np.save(folder / "palette.npy", np.zeros((512, 3), np.float32))
    steps, decay = config.schedule.steps, config.schedule.decay
    last = steps if last is None else last
    shards = {"path": "shards", "digest": "d" * 64, "palette_sha256": "a" * 64, "source": "synthetic"}
    status = "finished" if last == steps else "stopped"
    write_json(folder / "run.json", {"shards": shards, "starts": [], "status": status, "step": last})
    random, parameters = np.random.default_rng(seed), parameters_of(config)
    with (folder / "metrics.jsonl").open("w") as rows:
        every = config.validation.every_steps
        for step in sorted({*range(every, last + 1, every), last}):
            images = BATCH * step
            loss = float(law.loss(parameters, images) * np.exp(noise * random.standard_normal()))
            if decay == "cosine" and step < steps:
                loss *= 1.05
            if decay == "wsd" and step > steps - steps // 10:
                loss *= 0.97
            rate = learning_rate_at(step, 1e-3, config.schedule)
            rows.write(to_line({"step": step, "images": images, "loss": loss, "learning_rate": rate, "applied": True}))
            rows.write(to_line({"step": step, "images": images, "valid_loss": loss}))
    return folder


def write_grid(root: Path, budgets: Sequence[int], noise: float, decay: str = "cosine", seed: int = 0) -> list[Path]:
    """A run for each shape and number of steps."""
    return [
        write_run(
            root / f"l{layers}-w{width}-{steps}",
            config_of(layers, width, steps, decay),
            noise,
            seed + 7 * steps + place,
        )
        for place, (layers, width) in enumerate(SHAPES)
        for steps in budgets
    ]


def change_json(path: Path, **values: Any) -> None:
    """Changes keys of run.json's shards."""
    record = json.loads(path.read_text())
    record["shards"] |= values
    path.write_text(json.dumps(record))
