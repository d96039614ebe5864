"""What a model folder holds of its model: the configuration, and the record of its training."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from data_prep.common.files import read_json
from pipeline.checkpoint.metrics_log import Row, read_rows
from pipeline.model_folder.training_record import TrainingRecord, read_training_record


@dataclass(frozen=True)
class Facts:
    """The training's are empty where the folder has no record of it."""

    config: dict[str, Any]
    """config.json."""
    parameters: int
    training: TrainingRecord
    rows: list[Row]
    """training/metrics.jsonl."""

    @property
    def step(self) -> int | None:
        return self.training.step

    @property
    def masked(self) -> bool:
        """Whether it predicts hidden colours; transformers has no class for it."""
        return self.config["model_type"] not in ("imagegpt", "gpt2")

    @property
    def source(self) -> str | None:
        """The name of the pictures it was trained on."""
        return self.training.source


def read_facts(folder: Path) -> Facts:
    """Raises ValueError naming a file that is damaged."""
    record = read_training_record(folder)
    config = read_json(folder / "config.json")
    return Facts(
        config=config,
        parameters=parameters(folder, config),
        training=record,
        rows=list(read_rows(record.metrics)) if record.metrics else [],
    )


def parameters(folder: Path, config: dict[str, Any]) -> int:
    """Parameters of a model folder by its weights' headers; ImageGPT's biases, all zero, do not count."""
    count = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="np") as weights:
            for name in weights.keys():  # noqa: SIM118 (no mapping)
                if config["model_type"] != "imagegpt" or not name.endswith(".bias"):
                    count += math.prod(weights.get_slice(name).get_shape())
    return count
