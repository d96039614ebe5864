"""The record of the training in a model folder: the files in `training/` that `export` writes next to the weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_prep.common.files import read_json
from pipeline.checkpoint.metrics_log import METRICS_FILE
from pipeline.checkpoint.metrics_table import MetricsTable, read_table, table_of
from pipeline.checkpoint.mixture_record import changes, describe_weights, sets_ever
from pipeline.train.data.mixture_history import Segment

TRAINING_FOLDER = "training"
CHECKPOINT_FILE, RUN_FILE, CONFIG_FILE = "checkpoint.json", "run.json", "config.yaml"


@dataclass(frozen=True)
class TrainingRecord:
    """The content of `training/`; fields are empty if a file does not exist."""

    checkpoint: dict[str, Any]
    """checkpoint.json: step, images, digests."""
    run: dict[str, Any]
    """run.json: shard set, starts with their commands, hardware and packages."""
    settings: dict[str, Any]
    """config.yaml."""
    metrics: Path | None
    """The path of metrics.jsonl, if it exists."""

    @property
    def table(self) -> MetricsTable:
        """The rows of metrics.jsonl."""
        return read_table(self.metrics) if self.metrics else table_of([])

    @property
    def step(self) -> int | None:
        return self.checkpoint.get("step")

    @property
    def averaged_steps(self) -> list[int]:
        """The steps whose weights were averaged; empty if the weights are those of one checkpoint."""
        return self.checkpoint.get("averaged_steps", [])

    @property
    def weights(self) -> str:
        """Which weights of the checkpoint: raw, or ema for their exponential moving average."""
        return self.checkpoint.get("weights", "raw")

    @property
    def planned_steps(self) -> int | None:
        """schedule.steps."""
        return (self.settings.get("schedule") or {}).get("steps")

    @property
    def source(self) -> str | None:
        """The name of the training dataset; those of a mixture, with the names of their sets and their shares."""
        known = self._sources_of_sets
        sets = [
            each | {"name": f"{known[each['digest']]} ({each['name']})"} if each["digest"] in known else each
            for each in self.mixture
        ]
        return describe_weights(sets) or self.run.get("shards", {}).get("source")

    @property
    def sources(self) -> list[str]:
        """The names of the training datasets: one, or those of a mixture."""
        alone = self.run.get("shards", {}).get("source")
        found = [self._sources_of_sets.get(each["digest"]) for each in self.mixture] or [alone]
        return [name for name in dict.fromkeys(found) if name]

    @property
    def _sources_of_sets(self) -> dict[str, str]:
        """By digest, also of sets that were removed from the mixture."""
        run = {each["digest"]: each["source"] for each in self.run.get("shards", {}).get("mixture", [])}
        return run | {each["digest"]: each["source"] for each in self.mixture if each["source"]}

    @property
    def images_of_sets(self) -> dict[str, int]:
        """Images that were read of each set of a mixture, by digest; empty if the run never had a mixture."""
        segments, images = self.checkpoint.get("mixture", []), self.checkpoint.get("images", 0)
        read = [Segment.from_dict(segment) for segment in segments if segment["start"] <= images]
        return read[-1].consumed_at(images, self.settings.get("seed", 0)) if read else {}

    @property
    def mixture(self) -> list[dict[str, Any]]:
        """Name, digest, weight and source of each shard set that it was trained on; empty if it never had a mixture."""
        return sets_ever(self.mixture_changes)

    @property
    def mixture_changes(self) -> list[dict[str, Any]]:
        """From which image on which sets had which weights; empty if the run never had a mixture."""
        return changes(self.checkpoint.get("mixture", []), self.checkpoint.get("images", 0))

    @property
    def trained_on(self) -> list[str]:
        """Digests of the shard sets that it was trained on; empty if they are not recorded."""
        alone = self.checkpoint.get("shards_digest")
        return [each["digest"] for each in self.mixture] or ([alone] if alone else [])


def read_training_record(folder: Path) -> TrainingRecord:
    """Reads the record of a model folder. Raises ValueError that names a damaged file."""
    training = folder / TRAINING_FOLDER
    settings, metrics = training / CONFIG_FILE, training / METRICS_FILE
    return TrainingRecord(
        checkpoint=_optional_json(training / CHECKPOINT_FILE),
        run=_optional_json(training / RUN_FILE),
        settings=_settings(settings) if settings.is_file() else {},
        metrics=metrics if metrics.is_file() else None,
    )


def averaged_text(steps: Sequence[int], weights: str) -> str | None:
    """What averaged weights are; None if neither steps were averaged nor the weights are a moving average."""
    if weights == "ema":
        return "the exponential moving average of the trained weights (EMA)"
    return f"the mean of those at steps {', '.join(f'{step:,}' for step in steps)}" if steps else None


def unfinished(step: int | None, planned: int | None) -> str | None:
    """A sentence for a model whose training did not reach the end of its schedule; None otherwise."""
    if step is None or planned is None or step >= planned:
        return None
    return f"Its training was not finished: step {step:,} of {planned:,}."


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML; restore the run's configuration, or export again.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} has no keys and values; restore the run's configuration, or export again.")
    return settings


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
