"""Exports a run's checkpoint as a Hugging Face model folder; parameters are read one by one from its fragments."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel

from data_prep.common.files import read_json, write_json
from data_prep.palette.codec import load_palette, palette_sha256
from data_prep.shards.addresses import hide_secrets
from data_prep.shards.reader import ShardSet, open_shard_set
from pipeline.checkpoint.format import Checkpoint, CheckpointRecord, committed, open_checkpoint, step_folder, step_of
from pipeline.checkpoint.fragments import EMA
from pipeline.checkpoint.metrics_log import METRICS_FILE, TENSORBOARD_FOLDER, lines_until
from pipeline.checkpoint.probe import HeldOutImages, from_json, probe_batch
from pipeline.checkpoint.run_files import run_of
from pipeline.checkpoint.run_folder import CHECKPOINTS_FOLDER, CONFIG_FILE, PALETTE_FILE, RECORD_FILE
from pipeline.config import ObjectiveConfig
from pipeline.model import objectives
from pipeline.model.gpt import build_model
from pipeline.model.masks import Batch, Masks
from pipeline.model_folder.card import write_card
from pipeline.model_folder.convert import is_masked, save_model_folder
from pipeline.model_folder.lazy_weights import fetching_model
from pipeline.model_folder.tensorboard_events import copy_events
from pipeline.model_folder.training_record import CHECKPOINT_FILE, TRAINING_FOLDER

logger = logging.getLogger(__name__)

Kind = Literal["raw", "ema"]
"""Which weights of a checkpoint: those that were trained, or their exponential moving average."""
CHECKPOINT_FACTS = ("step", "images", "palette_sha256", "shards_digest", "precision")
"""What a model folder records of its checkpoint; none of it depends on the number of ranks."""
PROBE_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp8": 5e-2}
"""Allowed difference in nats per token between the exported fp32 weights and the run, by the run's precision (fp8 runs
evaluate in bf16)."""


def find_checkpoint(source: Path, step: int | None = None, option: str = "--step") -> Checkpoint:
    """The checkpoint that `source` names: a checkpoint itself, or of a run the one of `step`, by default the newest.

    Raises ValueError if there is none or its files are damaged.
    """
    if (source / RECORD_FILE).is_file() and not (source / CHECKPOINTS_FOLDER).is_dir():
        raise ValueError(f"{source} has no checkpoint yet, or its folder {CHECKPOINTS_FOLDER} is missing.")
    folder = source
    if (source / CHECKPOINTS_FOLDER).is_dir():
        folders = committed(source / CHECKPOINTS_FOLDER)
        if not folders:
            raise ValueError(f"{source} has no checkpoint yet.")
        folder = folders[-1] if step is None else step_folder(source / CHECKPOINTS_FOLDER, step)
        if folder not in folders:
            steps = ", ".join(str(step_of(other)) for other in folders)
            raise ValueError(f"{option} has {step}, but {source} has no checkpoint of this step; it has {steps}.")
    checkpoint = open_checkpoint(folder)
    damage = checkpoint.damage()
    if damage is not None:
        raise ValueError(f"{damage}; choose another checkpoint with --step, or restore a copy.")
    return checkpoint


def find_checkpoints(source: Path, steps: Sequence[int]) -> list[Checkpoint]:
    """The checkpoints of two or more steps of a run, oldest first. Raises ValueError if one is missing or damaged."""
    if not (source / CHECKPOINTS_FOLDER).is_dir():
        raise ValueError(f"--average takes the checkpoints of a run, but {source} is not a run with checkpoints.")
    if len(set(steps)) < 2 or len(set(steps)) < len(steps):
        listed = ",".join(map(str, steps))
        raise ValueError(f"--average is {listed}; it must be two or more steps, each once, such as 1000,2000,3000.")
    return [find_checkpoint(source, step, "--average") for step in sorted(steps)]


def export(checkpoint: Checkpoint, folder: Path, earlier: Sequence[Checkpoint] = (), kind: Kind = "raw") -> None:
    """Writes the model folder atomically, after checks of the logits and, if the shard set is available, the probe.

    earlier: checkpoints of the same run; with them the model has the mean of all raw weights. Raises ValueError if the
    checkpoint has no weights of this kind.
    """
    run = run_of(checkpoint.folder)
    record = checkpoint.record
    palette = load_palette(run / PALETTE_FILE, GPT2Config.from_dict(record.model).colors, key="the run's palette")
    if palette_sha256(palette) != record.palette_sha256:
        raise ValueError(
            f"{run / PALETTE_FILE} has the palette {palette_sha256(palette)[:12]}, but {checkpoint.folder} was trained "
            f"with {record.palette_sha256[:12]}; restore the run's palette."
        )
    weights = AveragedWeights([*earlier, checkpoint]) if earlier else CheckpointWeights(checkpoint, kind)
    model = fetching_model(weights.config, weights)
    if is_masked(model.config):
        model.config.mask_probability = _run_config(run)["objective"]["mask_probability"]
    loss = _recomputed_probe_loss(model, record, run)
    if loss is not None:
        _check_probe_loss(loss, [*earlier, checkpoint], kind)
    save_model_folder(
        model,
        model.config,
        palette,
        folder,
        weights=weights,
        add_files=lambda temporary: _add_record(temporary, [*earlier, checkpoint], kind, folder.resolve().name),
    )


class CheckpointWeights(Mapping[str, torch.Tensor]):
    """A checkpoint's fp32 weights by name, each assembled from its fragments on access."""

    def __init__(self, checkpoint: Checkpoint, kind: Kind = "raw") -> None:
        """Raises ValueError if its parameters do not match its configuration, or if it has no weights of this kind."""
        self.config = GPT2Config.from_dict(checkpoint.record.model)
        self._reader, self._state = checkpoint.reader(mapped=False), EMA if kind == "ema" else "weight"
        if kind == "ema" and not self._reader.has_average:
            raise ValueError(
                f"--weights is ema, but {checkpoint.folder} has no average of the weights, because its run had "
                f"ema.decay 0; omit --weights, or choose a checkpoint that was saved with ema.decay above 0."
            )
        with torch.device("meta"):
            self._names = dict(build_model(self.config).named_parameters())
        for name, parameter in self._names.items():
            if self._reader.shapes.get(name) != tuple(parameter.shape):
                raise ValueError(
                    f"{checkpoint.folder} has no {name} of shape {tuple(parameter.shape)}, which its config requires."
                )

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._reader.read(name, self._state)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class AveragedWeights(Mapping[str, torch.Tensor]):
    """The mean of the weights of several checkpoints, in fp64, rounded to fp32: one parameter in memory at a time."""

    def __init__(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Raises ValueError if their models differ."""
        self._each = [CheckpointWeights(checkpoint) for checkpoint in checkpoints]
        self.config = self._each[-1].config
        for checkpoint in checkpoints:
            if checkpoint.record.model != checkpoints[-1].record.model:
                raise ValueError(f"{checkpoint.folder} has another model than {checkpoints[-1].folder}.")

    def __getitem__(self, name: str) -> torch.Tensor:
        total = self._each[0][name].double()
        for weights in self._each[1:]:
            total += weights[name]
        return (total / len(self._each)).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._each[0])

    def __len__(self) -> int:
        return len(self._each[0])


@torch.no_grad()
def _recomputed_probe_loss(model: GPT2LMHeadModel, record: CheckpointRecord, run: Path) -> float | None:
    """The loss of the check image, in nats per token; None, which is logged, if the shard set is not available."""
    if record.probe_batch is not None:
        return _loss_of(model, from_json(record.probe_batch))
    recorded = read_json(run / RECORD_FILE)["shards"]
    paths = {each["digest"]: each["path"] for each in recorded.get("mixture", [])}
    shards_path = paths.get(record.shards_digest, recorded["path"])
    shown = hide_secrets(shards_path)
    try:
        shards = open_shard_set(shards_path)
    except (ValueError, OSError):
        logger.warning(f"the shard set {shown} is not available, so the loss of the check image was not checked")
        return None
    if shards.digest != record.shards_digest:
        logger.warning(f"{shown} is now another shard set, so the loss of the check image was not checked")
        return None
    return _probe_loss(model, shards, run, record.probe_tokens)


def _check_probe_loss(loss: float, checkpoints: Sequence[Checkpoint], kind: Kind) -> None:
    """Compares the loss of raw weights with the stored one; an average's is logged beside all stored ones.

    Checkpoints store the loss of the raw weights only.
    """
    record, run = checkpoints[-1].record, run_of(checkpoints[-1].folder)
    if len(checkpoints) > 1:
        if not isfinite(loss):
            raise ValueError(
                f"{run}: the average of the weights gives the check image a loss of {loss}; it must be finite: choose "
                f"other steps for --average."
            )
        same = [one.record for one in checkpoints if _probe_of(one.record) == _probe_of(record)]  # a mixture may change
        each = ", ".join(f"{one.probe_loss:.5f} at step {one.step:,}" for one in same)
        logger.info(f"loss of the check image, nats per token: {each}; {loss:.5f} with the average of their weights")
    elif kind == "ema":
        logger.info(
            f"loss of the check image at step {record.step:,}, nats per token: {record.probe_loss:.5f} with the raw "
            f"weights, {loss:.5f} with their moving average"
        )
    elif not abs(loss - record.probe_loss) <= PROBE_TOLERANCE[record.precision]:
        raise ValueError(
            f"{run}: the exported weights give the check image a loss of {loss:.5f}, but {record.probe_loss:.5f} when "
            f"step {record.step} was saved; the checkpoint does not have the trained weights."
        )


def _probe_of(record: CheckpointRecord) -> tuple[str, int | None, dict[str, Any] | None]:
    """What determines the check image of a run's checkpoint."""
    return record.shards_digest, record.probe_tokens, record.probe_batch


def _probe_loss(model: GPT2LMHeadModel, shards: ShardSet, run: Path, tokens_read: int | None) -> float:
    """Nats per token of the check image, computed as in training."""
    config, split = _run_config(run), shards.split("valid")
    objective = ObjectiveConfig(**config["objective"])
    masks = Masks(config["seed"], objective.mask_probability) if objective.kind == "masked_color" else None
    return _loss_of(model, probe_batch(HeldOutImages(split, masks), tokens_read))


def _loss_of(model: GPT2LMHeadModel, probe: Batch) -> float:
    """Nats per token of a batch."""
    tokens = torch.from_numpy(probe.tokens.astype(np.int64))
    masked = None if probe.masked is None else torch.from_numpy(probe.masked)
    inputs, targets = objectives.inputs_and_targets(tokens, masked, model.config.colors)
    return float(objectives.image_loss(model(inputs).logits, targets, model.config.colors).mean())


def _run_config(run: Path) -> dict[str, Any]:
    return yaml.safe_load((run / CONFIG_FILE).read_text())


def _add_record(temporary: Path, checkpoints: Sequence[Checkpoint], kind: Kind, name: str) -> None:
    """Adds the training record: the run's record, configuration, metrics and events, and the card of `name`."""
    checkpoint = checkpoints[-1]
    run = run_of(checkpoint.folder)
    training = temporary / TRAINING_FOLDER
    training.mkdir()
    for file in (CONFIG_FILE, RECORD_FILE):
        (training / file).write_text(hide_secrets((run / file).read_text()))
    with (training / METRICS_FILE).open("w") as rows:
        rows.writelines(lines_until(run / METRICS_FILE, checkpoint.record.step))
    copy_events(run / TENSORBOARD_FOLDER, training / TENSORBOARD_FOLDER, checkpoint.record.step)
    facts = {key: getattr(checkpoint.record, key) for key in CHECKPOINT_FACTS}
    if checkpoint.record.mixture:
        facts["mixture"] = checkpoint.record.mixture
    if len(checkpoints) > 1:
        facts["averaged_steps"] = [one.record.step for one in checkpoints]
    if kind == "ema":
        facts["weights"] = kind
    write_json(training / CHECKPOINT_FILE, facts)
    write_card(temporary, name)
