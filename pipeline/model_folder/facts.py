"""What a model folder says of itself: the model, how it was trained, and what was measured."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from data_prep.common.files import read_json
from pipeline.model_folder.training_record import TrainingRecord, read_training_record
from pipeline.results.schema import RANDOM_WEIGHTS

RESULTS = Path("results")
"""A subfolder of a model folder."""
CURVE = "training.png"
"""The training curve, in the subfolder of results."""


@dataclass(frozen=True)
class Facts:
    """What a model folder says of itself; empty where it says nothing."""

    config: dict[str, Any]
    """config.json."""
    parameters: int
    training: TrainingRecord
    rows: list[dict[str, Any]]
    """training/metrics.jsonl."""
    results: dict[str, dict[str, Any]]
    """results/<task>.json, by task."""
    random_weights: dict[str, dict[str, Any]]
    """results/random_weights/<task>.json, by task."""
    figures: list[str]
    """Names of the PNGs in results/."""

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
    from pipeline.publish.results_section import read_results

    record = read_training_record(folder)
    config = read_json(folder / "config.json")
    return Facts(
        config=config,
        parameters=parameters(folder, config),
        training=record,
        rows=[json.loads(line) for line in record.metrics.read_text().splitlines()] if record.metrics else [],
        results=read_results(folder / RESULTS),
        random_weights=read_results(folder / RESULTS / RANDOM_WEIGHTS),
        figures=sorted(file.name for file in (folder / RESULTS).glob("*.png")),
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
