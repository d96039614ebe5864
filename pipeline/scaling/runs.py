"""Reads runs for a fit: what must be equal between them, and the validation losses that a scaling law describes.

A law describes losses of one kind of training. After a decay the loss is lower than at a constant learning rate with as
many images, so the two are never in one fit:

    decayed    the last loss of a finished run with decay cosine, linear or wsd: one point a run
    constant   the losses after the warm-ups at the peak learning rate (constant, or wsd before its decay)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import yaml

from data_prep.common.files import read_json
from pipeline import costs
from pipeline.checkpoint.metrics_log import METRICS_FILE, Row, read_backwards
from pipeline.checkpoint.run_files import CONFIG_FILE, RECORD_FILE
from pipeline.config import ModelConfig, ValidationConfig
from pipeline.layout import BatchConfig
from pipeline.scaling.law import Points
from pipeline.schedule import ScheduleConfig

if TYPE_CHECKING:
    from transformers import GPT2Config

Kind = Literal["decayed", "constant"]
PALETTE_FILE = "palette.npy"
EQUAL = ("palette", "resolution", "objective", "training data", "block", "augmentation", "dropout", "validation images")
"""What the runs of a fit have in common, in the order in which it is compared."""
T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """What a run's folder records of it."""

    name: str
    """The name of its folder, or the path if names are equal."""
    path: Path
    model: ModelConfig
    schedule: ScheduleConfig
    batch: BatchConfig
    equal: dict[str, Any]
    """The values under EQUAL."""
    shape: "GPT2Config"
    validations: list[Row]
    """Rows with a finite validation loss, oldest first."""
    last_step: int
    """The last step with a row of its own."""

    @cached_property
    def parameters(self) -> int:
        """All parameters, embeddings and head included."""
        return costs.parameter_count(self.shape)

    @cached_property
    def flops_per_image(self) -> float:
        """FLOPs of an image's forward and backward pass."""
        return costs.flops_per_token(self.shape) * self.shape.n_positions

    @property
    def decays(self) -> bool:
        return self.schedule.decay != "constant"

    def rows(self, kind: Kind, min_images: int = 0) -> list[Row]:
        """The validation rows that a law of this kind describes, from this many images on."""
        return [row for row in self._rows(kind) if row["images"] >= min_images]

    def _rows(self, kind: Kind) -> list[Row]:
        steps = self.schedule.steps
        if kind == "decayed":
            return [row for row in self.validations if self.decays and row["step"] == steps][-1:]
        first = max(self.schedule.warmup_steps, self.batch.warmup_steps)
        last = {"constant": steps, "wsd": steps - (self.schedule.decay_steps or 0)}.get(self.schedule.decay, 0)
        return [row for row in self.validations if first < row["step"] <= last]


@dataclass(frozen=True)
class Selected:
    """The points of a fit."""

    kind: Kind
    runs: list[Run]
    """The runs with points."""
    points: Points
    """`points.runs` are indices of `runs`."""
    notes: list[str]
    """A sentence for each run that is skipped, and for rows that are."""

    def flops(self) -> np.ndarray:
        """Training FLOPs of each point: float64 (n,)."""
        return self.points.images * np.array([run.flops_per_image for run in self.runs])[self.points.runs]

    @property
    def largest(self) -> int:
        """The index of the run with the most training FLOPs."""
        return int(self.points.runs[np.argmax(self.flops())])


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs, which can be in one fit. Raises ValueError if they can't, or if a folder is not a run."""
    names = [folder.resolve().name for folder in folders]
    resolved = [folder.resolve() for folder in folders]
    for place, folder in enumerate(resolved):
        if folder in resolved[:place]:
            raise ValueError(f"{folders[place]} is given twice; give each run once.")
    if len(set(names)) < len(names):
        names = list(map(str, folders))
    runs = [_read(folder, name) for folder, name in zip(folders, names, strict=True)]
    for run in runs[1:]:
        _check_equal(runs[0], run)
    return runs


def _check_equal(first: Run, run: Run) -> None:
    for key in EQUAL:
        if first.equal[key] != run.equal[key]:
            raise ValueError(
                f"{run.path} has {key} {_shown(run.equal[key])}, but {first.path} has {_shown(first.equal[key])}; the "
                f"losses of one fit must be of the same {key}."
            )


def _shown(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text  # a digest


def _read(folder: Path, name: str) -> Run:
    from pipeline.model.gpt_config import gpt2_config

    if not (folder / RECORD_FILE).is_file():
        raise ValueError(f"{folder} has no {RECORD_FILE}; it must be the folder of a run that was started.")
    record, settings = _record(folder), _settings(folder)
    start = settings.get("start") or {}
    if start.get("path") and not (start.get("moments") and start.get("position")):
        raise ValueError(
            f"{folder} started from the weights of {start['path']} (start.path); a scaling law describes runs from "
            f"initial weights, and branches of them with start.moments and start.position."
        )
    model = _section(ModelConfig, settings, "model", folder)
    schedule = _section(ScheduleConfig, settings, "schedule", folder)
    validations = list(_validations(folder))[::-1]
    if not validations:
        raise ValueError(
            f"{folder / METRICS_FILE} has no row with a finite valid_loss; a fit needs the runs' validation losses: "
            f"omit the run, or let it reach a multiple of validation.every_steps."
        )
    last = next(read_backwards(folder / METRICS_FILE, "step"), validations[-1])
    kind = (settings.get("objective") or {}).get("kind", "next_color")
    return Run(
        name, folder, model, schedule, _section(BatchConfig, settings, "batch", folder),
        _equal(record["shards"], settings, model), gpt2_config(model, _colors(folder), kind), validations,
        int(last["step"]),
    )  # fmt: skip


def _equal(shards: dict[str, Any], settings: dict[str, Any], model: ModelConfig) -> dict[str, Any]:
    """The values under EQUAL."""
    objective, data, validation = (settings.get(key) or {} for key in ("objective", "data", "validation"))
    kind, masked = objective.get("kind", "next_color"), objective.get("mask_probability", 0.15)
    return {
        "palette": shards.get("palette_sha256"),
        "resolution": model.resolution,
        "objective": objective_name(kind, masked),
        "training data": _data_name(shards),
        "block": model.block,
        "augmentation": f"flip {data.get('flip', False)}, reflect_crop {data.get('reflect_crop', 0)}",
        "dropout": model.dropout,
        "validation images": validation.get("images", ValidationConfig().images),
    }


def _data_name(shards: dict[str, Any]) -> str:
    """The digest of the shard set; of a mixture those of all sets, with their weights."""
    sets = shards.get("mixture") or []
    return " + ".join(f"{one['weight']} x {one['digest'][:12]}" for one in sets) or shards["digest"]


def objective_name(kind: str, mask_probability: float) -> str:
    """An objective, with what its loss depends on."""
    return kind if kind == "next_color" else f"{kind} ({mask_probability} masked)"


def _record(folder: Path) -> dict[str, Any]:
    try:
        record = read_json(folder / RECORD_FILE)
        if not isinstance(record["shards"]["digest"], str):
            raise TypeError
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / RECORD_FILE} is damaged: it has no record of a run's shard set; restore it from a copy."
        ) from error
    return record


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        settings = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has no {CONFIG_FILE}; restore it from a copy, or omit the run.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: it is not YAML; restore it from a copy.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is damaged: it has no keys and values; restore it from a copy.")
    return settings


def _section(section: type[T], settings: dict[str, Any], key: str, folder: Path) -> T:
    """A section of config.yaml; keys of other versions are ignored."""
    known = {field.name for field in fields(section)}  # type: ignore[arg-type]
    try:
        return section(**{name: value for name, value in settings[key].items() if name in known})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} is damaged in {key} ({error}); restore it from a copy.") from error


def _validations(folder: Path) -> Iterator[Row]:
    """Rows with a finite validation loss, newest first."""
    path = folder / METRICS_FILE
    for row in read_backwards(path, "valid_loss", path.stat().st_size if path.is_file() else 0):
        loss, images = row["valid_loss"], row.get("images")
        if isinstance(loss, float) and isinstance(images, int) and 0 < loss < np.inf and images > 0:
            yield row


def _colors(folder: Path) -> int:
    """Colors of the run's palette."""
    try:
        return len(np.load(folder / PALETTE_FILE, allow_pickle=False))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder / PALETTE_FILE} can't be read; copy it from the run's shard set, whose palette it is."
        ) from error


def select(runs: Sequence[Run], wanted: Kind | None, min_images: int = 0) -> Selected:
    """The points of the wanted kind; None: of the one that is enough for a fit, and of decayed if both are.

    min_images: losses of fewer images are excluded.
    """
    kinds: tuple[Kind, ...] = (wanted,) if wanted else ("decayed", "constant")
    found = [_of_kind(runs, kind, min_images) for kind in kinds]
    return next(filter(_fits, found), max(found, key=lambda selected: len({run.parameters for run in selected.runs})))


def _fits(selected: Selected) -> bool:
    try:
        require_enough(selected)
        held_out(selected)
    except ValueError:
        return False
    return True


def _of_kind(runs: Sequence[Run], kind: Kind, min_images: int) -> Selected:
    chosen: list[Run] = []
    rows, notes = [], []
    for run in runs:
        own = run.rows(kind, min_images)
        if own:
            rows += [(run.parameters, row["images"], row["valid_loss"], len(chosen)) for row in own]
            chosen.append(run)
        else:
            notes.append(f"{run.name} is skipped: {_why_none(run, kind, min_images)}.")
    table = np.array(rows, dtype=float).reshape(-1, 4)
    points = Points(table[:, 0], table[:, 1], table[:, 2], table[:, 3].astype(int))
    return Selected(kind, chosen, points, notes)


def _why_none(run: Run, kind: Kind, min_images: int) -> str:
    """Why a run has no point of a kind."""
    if run.rows(kind):
        return f"its losses are of fewer than {min_images:,} images (--min_images)"
    decay, steps = run.schedule.decay, run.schedule.steps
    if kind == "constant":
        if decay in ("constant", "wsd"):
            return "it has no validation loss between its warm-up and its decay"
        return f"its learning rate falls ({decay}) from the warm-up on, and this fit is of constant rates"
    if not run.decays:
        return "its learning rate is constant, and this fit is of decayed ends"
    if run.last_step < steps:
        return f"it is at step {run.last_step:,} of {steps:,}, and a run with decay {decay} counts at its end only"
    return f"it has no validation loss at its end, step {steps:,}"


MIN_SIZES, MIN_POINTS = 3, 6
"""For three numbers of E and A / N^alpha, and more points than the five numbers of the law."""
COLLINEAR = 0.999
"""Correlation of log N and log D from which the parts of the loss can't be told apart."""


def require_enough(selected: Selected, without: str = "") -> None:
    """Raises ValueError if the points do not determine a law. without: names the run that is held out."""
    points = selected.points
    sizes, kept = np.unique(points.parameters), f" without {without}, the largest, which is held out" if without else ""
    rates = "the ends of decaying runs" if selected.kind == "decayed" else "constant learning rates"
    if len(sizes) < MIN_SIZES or len(points) < MIN_POINTS:
        raise ValueError(
            f"the runs have {len(points)} losses of {len(sizes)} model sizes at {rates}{kept}; a fit needs at least "
            f"{MIN_POINTS} losses of {MIN_SIZES} sizes{' without it' if without else ''}: give more runs"
            f"{'' if not selected.notes else ' (' + ' '.join(selected.notes).rstrip('.') + ')'}."
        )
    logs = np.log(points.parameters), np.log(points.images)
    if np.ptp(logs[1]) < 0.01 or abs(np.corrcoef(*logs)[0, 1]) > COLLINEAR:
        raise ValueError(
            f"the runs{kept} have no size that was trained on different numbers of images, so the parts of the loss "
            f"that are due to size and to images can't be told apart; give runs of one size with other schedule.steps."
        )


def held_out(selected: Selected) -> tuple[Selected, Selected]:
    """The points without those of the largest run, and those of the largest. Raises ValueError if too few are left."""
    inside = selected.points.runs != selected.largest
    rest, largest = selected.points.where(inside), selected.points.where(~inside)
    fitted = Selected(selected.kind, selected.runs, rest, selected.notes)
    require_enough(fitted, selected.runs[selected.largest].name)
    return fitted, Selected(selected.kind, selected.runs, largest, [])
