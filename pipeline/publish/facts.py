"""What a model folder says of itself: the model, how it was trained, and what was measured."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from data_prep.files import read_json
from pipeline.evaluate.results import RANDOM_WEIGHTS

TRAINING, RESULTS = Path("training"), Path("results")
"""Subfolders of a model folder."""
CURVE = "training.png"
"""The training curve, in the subfolder of results."""


@dataclass(frozen=True)
class Facts:
    """What a model folder says of itself; empty where it says nothing."""

    config: dict[str, Any]
    """config.json."""
    parameters: int
    checkpoint: dict[str, Any]
    """training/checkpoint.json: step, images, digests."""
    run: dict[str, Any]
    """training/run.json: shard set, starts with their hardware and packages."""
    settings: dict[str, Any]
    """training/config.yaml."""
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
        return self.checkpoint.get("step")

    @property
    def masked(self) -> bool:
        """Whether it predicts hidden colours; transformers has no class for it."""
        return self.config["model_type"] not in ("imagegpt", "gpt2")

    @property
    def source(self) -> str | None:
        """The name of the pictures it was trained on."""
        return self.run.get("shards", {}).get("source")


def read_facts(folder: Path) -> Facts:
    """Raises ValueError naming a file that is damaged."""
    metrics = folder / TRAINING / "metrics.jsonl"
    settings = folder / TRAINING / "config.yaml"
    config = read_json(folder / "config.json")
    return Facts(
        config=config,
        parameters=parameters(folder, config),
        checkpoint=_optional_json(folder / TRAINING / "checkpoint.json"),
        run=_optional_json(folder / TRAINING / "run.json"),
        settings=yaml.safe_load(settings.read_text()) if settings.is_file() else {},
        rows=[json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else [],
        results=read_results(folder / RESULTS),
        random_weights=read_results(folder / RESULTS / RANDOM_WEIGHTS),
        figures=sorted(file.name for file in (folder / RESULTS).glob("*.png")),
    )


def read_results(results: Path) -> dict[str, dict[str, Any]]:
    """The content of each task's JSON in a folder, by task; files of other kinds are passed over."""
    contents = [read_json(path) for path in sorted(results.glob("*.json"))]
    return {
        content["task"]: content for content in contents if isinstance(content, dict) and "inputs_digest" in content
    }


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def parameters(folder: Path, config: dict[str, Any]) -> int:
    """Parameters of a model folder by its weights' headers; ImageGPT's biases, all zero, do not count."""
    count = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="np") as weights:
            for name in weights.keys():  # noqa: SIM118 (no mapping)
                if config["model_type"] != "imagegpt" or not name.endswith(".bias"):
                    count += math.prod(weights.get_slice(name).get_shape())
    return count
