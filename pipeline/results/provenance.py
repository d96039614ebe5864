"""The provenance of results: the model's digest, its shape, and its training, read from its folder."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.common.files import json_digest
from data_prep.palette.codec import palette_sha256
from pipeline.model_folder.files import model_digest
from pipeline.model_folder.training_record import read_training_record

if TYPE_CHECKING:
    from pipeline.model_folder.convert import LoadedModel

INITIAL_WEIGHTS = "nothing: initial weights"
"""The `source` of a model with initial weights."""


@dataclass(frozen=True)
class ModelFacts:
    """Facts about a model for the report. Facts about the training are None if the folder does not record them."""

    digest: str
    block: str
    objective: str
    parameters: int
    layers: int
    width: int
    heads: int
    resolution: int
    palette_sha256: str
    checkpoint_step: int | None
    planned_steps: int | None
    images_seen: int | None
    shards_digest: str | None
    source: str | None
    started_from: str | None
    """The model whose weights the training started from (start.path), if it did."""
    metrics: Path | None
    training_commands: tuple[str, ...]
    averaged_steps: tuple[int, ...] = ()
    """The steps whose weights were averaged, if they were."""
    weights: str = "raw"
    """ema if the weights are the moving average of the run's."""
    mixture: tuple[dict[str, Any], ...] = ()
    """Name, digest and weight of each shard set that it was trained on, if there were several."""

    @property
    def trained_on(self) -> list[str]:
        """Digests of the shard sets that it was trained on; empty if they are not recorded."""
        return [each["digest"] for each in self.mixture] or ([self.shards_digest] if self.shards_digest else [])


def model_facts(folder: Path, model: "LoadedModel") -> ModelFacts:
    """Reads the facts from a loaded model and from `training/` in its folder. Raises ValueError if that is damaged."""
    assert model.palette is not None
    record = read_training_record(folder)
    return ModelFacts(
        digest=model_digest(folder),
        block=model.block,
        objective="next_color" if model.mask_probability is None else "masked_color",
        parameters=sum(parameter.numel() for parameter in model.model.parameters()),
        layers=model.config.n_layer,
        width=model.config.n_embd,
        heads=model.config.n_head,
        resolution=model.resolution,
        palette_sha256=palette_sha256(model.palette),
        checkpoint_step=record.step,
        planned_steps=record.planned_steps,
        images_seen=record.checkpoint.get("images"),
        shards_digest=None if record.mixture else record.checkpoint.get("shards_digest"),
        source=record.source,
        started_from=(record.settings.get("start") or {}).get("path"),
        metrics=record.metrics,
        training_commands=tuple(dict.fromkeys(" ".join(start["command"]) for start in record.run.get("starts", []))),
        averaged_steps=tuple(record.averaged_steps),
        weights=record.weights,
        mixture=tuple(record.mixture),
    )


def untrained(facts: ModelFacts, seed: int) -> ModelFacts:
    """The facts of the same model with initial weights drawn from `seed`."""
    digest = json_digest([facts.digest, "initial weights", seed])
    return replace(facts, digest=digest, checkpoint_step=None, planned_steps=None, images_seen=None,
                   source=INITIAL_WEIGHTS, started_from=None, metrics=None, training_commands=(),
                   averaged_steps=(), weights="raw")  # fmt: skip
