"""What a run starts from, `start.path`: found, compared with the run that starts from it, and opened.

Its weights are read by fragments through `reader_of`, as a checkpoint's are. Ranks and engines are in
pipeline/train/start.py.
"""

import logging
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config

from data_prep.common.files import file_sha256, read_json
from data_prep.palette.codec import palette_sha256
from pipeline.checkpoint.format import MANIFEST, Checkpoint, committed, open_checkpoint
from pipeline.checkpoint.fragments import MOMENTS, Fragment, StateReader
from pipeline.checkpoint.run_files import CHECKPOINTS_FOLDER, RECORD_FILE, run_of
from pipeline.config import TrainConfig
from pipeline.hub import HUB, parse_name, pull
from pipeline.model.gpt_config import gpt2_config
from pipeline.training_set import TrainingSets
from pipeline.weights.folder_reader import FolderReader
from pipeline.weights.folder_settings import FolderSettings, read_folder_settings
from pipeline.weights.model_files import model_digest
from pipeline.weights.positions import ResampledPositions

logger = logging.getLogger(__name__)

GIVE = f"give a run, a checkpoint, a model folder, or {HUB}ORG/NAME"
OPTIONS = {"n_layer": "model.layers", "n_embd": "model.width", "n_head": "model.heads", "block": "model.block"}
"""Options that must be those of the origin, by their name in GPT2Config."""
CONSTANTS = (
    "n_inner",
    "activation_function",
    "layer_norm_epsilon",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
)
"""Settings of GPT2Config that a block always has, and a folder of another origin may have otherwise."""
RECORDED_STEP = Path("training/checkpoint.json")
"""In a model folder that `export` wrote: the step and images of its checkpoint."""


@dataclass(frozen=True)
class Origin:
    """A model to start from."""

    path: str
    """start.path: a name on a hub, or an absolute path."""
    folder: Path
    """The checkpoint, or the model folder."""
    config: GPT2Config
    palette_sha256: str | None
    """None if the folder has no palette."""
    source: Checkpoint | FolderSettings

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The checkpoint; None for a model folder."""
        return self.source if isinstance(self.source, Checkpoint) else None

    def digest(self) -> str:
        """sha256 of the checkpoint's manifest, which has those of all its files, or of the model folder, of which all
        weights are read."""
        return model_digest(self.folder) if self.checkpoint is None else file_sha256(self.folder / MANIFEST)

    def facts(self, digest: str) -> dict[str, Any]:
        """What run.json records."""
        record = self.source.record if isinstance(self.source, Checkpoint) else None
        exported, run = self.folder / RECORDED_STEP, run_of(self.folder)
        known = read_json(exported) if record is None and exported.is_file() else {}
        return {
            "path": self.path,
            "folder": str(self.folder.resolve()),
            "run": str(run.resolve()) if record and (run / RECORD_FILE).is_file() else None,
            "step": record.step if record else known.get("step"),
            "images": record.images if record else known.get("images"),
            "digest": digest,
            "palette_sha256": self.palette_sha256,
            "resolution": isqrt(self.config.n_positions),
        }


def check_start(config: TrainConfig, sets: TrainingSets, run: Path, *, download: bool = False) -> Origin | None:
    """Checks what can be known of `start` before the ranks meet. Raises ValueError naming the key.

    None if nothing is to be read: without start.path, if the run has checkpoints to resume from, and for a model on a
    hub, of which only the name is checked unless `download`.
    """
    start = config.start
    if start.path is None:
        return None
    if start.from_hub:
        parse_name(start.path.removeprefix(HUB))
    else:
        _check_no_cycle(start.path, run)
    if committed(run / CHECKPOINTS_FOLDER) or (start.from_hub and not download):
        return None
    origin = (
        folder_origin(start.path, pull(start.path.removeprefix(HUB))) if start.from_hub else find_origin(start.path)
    )
    check_fits(origin, config, sets)
    return origin


def _check_no_cycle(path: str, run: Path) -> None:
    origin = Path(path).resolve()
    for own in (run.resolve(), (run / CHECKPOINTS_FOLDER).resolve()):
        if origin.is_relative_to(own):
            raise ValueError(
                f"start.path is {path}, which is --run itself or lies in it; name another run, or remove start.path: a "
                f"run resumes from its own checkpoints."
            )


def find_origin(path: str) -> Origin:
    """The origin that a path names: of a run, its newest checkpoint with a valid manifest. Raises ValueError."""
    checkpoints = checkpoints_in(path)
    if checkpoints is None:
        return folder_origin(path, Path(path))
    damage = None
    for folder in reversed(checkpoints):
        try:
            return checkpoint_origin(path, open_checkpoint(folder))
        except ValueError as error:
            damage = damage or error
    raise ValueError(f"start.path is {path}, and none of its checkpoints can be read: {damage}")


def checkpoints_in(path: str) -> list[Path] | None:
    """The checkpoints of a run, oldest first, or the one that the path names; None for a model folder.

    Raises ValueError if it is none of these, or a run that has no checkpoint yet.
    """
    folder = Path(path)
    if (folder / MANIFEST).is_file():
        return [folder]
    if (folder / RECORD_FILE).is_file() or (folder / CHECKPOINTS_FOLDER).is_dir():
        found = committed(folder / CHECKPOINTS_FOLDER)
        if not found:
            raise ValueError(f"start.path is {path}, a run that has no checkpoint yet; {GIVE}.")
        return found
    if (folder / "config.json").is_file():
        return None
    if not folder.exists():
        raise ValueError(f"start.path is {path}, which does not exist; {GIVE}.")
    raise ValueError(f"start.path is {path}, which is not a model; {GIVE}.")


def checkpoint_origin(path: str, checkpoint: Checkpoint) -> Origin:
    """The origin of a checkpoint."""
    record = checkpoint.record
    absolute = str(Path(path).absolute())
    return Origin(absolute, checkpoint.folder, GPT2Config.from_dict(record.model), record.palette_sha256, checkpoint)


def folder_origin(path: str, folder: Path) -> Origin:
    """The origin of a model folder, which for a model on a hub is in the cache. Raises ValueError if it is damaged."""
    settings = read_folder_settings(folder)
    digest = None if settings.palette is None else palette_sha256(settings.palette)
    return Origin(path if path.startswith(HUB) else str(folder.absolute()), folder, settings.config, digest, settings)


def check_fits(origin: Origin, config: TrainConfig, sets: TrainingSets) -> None:
    """Raises ValueError, one sentence, if a run with this configuration and shard set can't start from the origin."""
    _check_model(origin, config, gpt2_config(config.model, sets.colors, config.objective.kind))
    _check_palette(origin, config.start.path, sets)
    _check_state(origin, config, sets)


def _check_model(origin: Origin, config: TrainConfig, ours: GPT2Config) -> None:
    path, other = config.start.path, "start from another model"
    trained, wanted = (getattr(model, "objective", "next_color") for model in (origin.config, ours))
    if trained != wanted:
        raise ValueError(
            f"objective.kind is {wanted}, but start.path {path} was trained with {trained}; set it to {trained}, or "
            f"{other}."
        )
    for name, key in OPTIONS.items():
        theirs, own = getattr(origin.config, name), getattr(ours, name)
        if theirs != own:
            raise ValueError(f"{key} is {own}, but start.path {path} has {theirs}; set it to {theirs}, or {other}.")
    for name in CONSTANTS:
        theirs, own = (_constant(model, name) for model in (origin.config, ours))
        if theirs != own:
            raise ValueError(
                f"start.path is {path}, whose {name} is {theirs}; a model of block {config.model.block} has {own}: "
                f"{other}."
            )


def _check_state(origin: Origin, config: TrainConfig, sets: TrainingSets) -> None:
    """What start.moments and start.position need."""
    path, start, checkpoint = config.start.path, config.start, origin.checkpoint
    for key in ("moments", "position"):
        if getattr(start, key) and checkpoint is None:
            raise ValueError(
                f"start.{key} is true, but start.path {path} is a model folder, which has weights only; give a run or "
                f"a checkpoint, or set start.{key} to false."
            )
    resolution = isqrt(origin.config.n_positions)
    if start.moments and resolution != config.model.resolution:
        raise ValueError(
            f"start.moments is true, but start.path {path} has resolution {resolution} and model.resolution is "
            f"{config.model.resolution}; moments of position embeddings can't be resampled: set start.moments to false."
        )
    if not start.position or checkpoint is None:
        return
    before = checkpoint.record.set_digests
    if not set(before) & set(sets.digests):
        raise ValueError(
            f"start.position is true, but start.path {path} was trained on {_shortened(before)}, and the shard sets of "
            f"this run are {_shortened(sets.digests)}; name at least one of those, or set start.position to false."
        )


def _shortened(digests: list[str]) -> str:
    return ", ".join(digest[:12] for digest in digests)


def _constant(model: GPT2Config, name: str) -> Any:
    return model.n_inner or 4 * model.n_embd if name == "n_inner" else getattr(model, name)


def _check_palette(origin: Origin, path: str | None, sets: TrainingSets) -> None:
    if origin.palette_sha256 is None:
        if origin.config.vocab_size - 1 != sets.colors:
            raise ValueError(
                f"{sets.first.path} has {sets.colors} colors, but start.path {path} has "
                f"{origin.config.vocab_size - 1}; start from a model of the same palette."
            )
    elif origin.palette_sha256 != sets.palette_sha256:
        raise ValueError(
            f"{sets.first.path} has the palette {sets.palette_sha256[:12]}, but start.path {path} was trained with the "
            f"palette {origin.palette_sha256[:12]}; prepare the shard set with palette.file of that model's run "
            f"(palette.npy)."
        )


class WeightsOnly:
    """A reader with zero moments, before Adam's first update, and no average."""

    optimizer_step = 0.0
    has_average = False

    def __init__(self, reader: StateReader) -> None:
        self._reader, self.shapes = reader, reader.shapes

    def read(self, name: str, state: str = "weight") -> torch.Tensor:
        """A complete parameter, or zeros for a moment: fp32, in its shape."""
        return torch.zeros(self.shapes[name]) if state in MOMENTS else self._reader.read(name)

    def fill(self, target: torch.Tensor, wanted: Fragment, state: str) -> None:
        """Reads the elements of `wanted` into `target`, (wanted.length,)."""
        if state in MOMENTS:
            target.zero_()
        else:
            self._reader.fill(target, wanted, "weight")


def reader_of(origin: Origin, config: TrainConfig) -> StateReader:
    """A reader of the run's initial state: the origin's weights, and its moments if start.moments.

    Position embeddings of another resolution are resampled. Raises ValueError if the origin is damaged.
    """
    source = origin.source
    reader: StateReader = source.reader() if isinstance(source, Checkpoint) else FolderReader(source)
    if config.start.moments:
        return reader
    if origin.config.n_positions != config.model.resolution**2:
        has_sos = config.objective.kind == "next_color"
        reader = ResampledPositions(reader, config.model.resolution, has_sos=has_sos)
    return WeightsOnly(reader)
