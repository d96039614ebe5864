"""Reads runs for a fit: what must be equal between them, and the validation losses that a scaling law describes.

A law describes losses of one kind of training. After a decay the loss is lower than at a constant learning rate with as
many images, so the two are never in one fit:

    decayed    the last loss of a finished run with decay cosine, linear or wsd: one point a run
    constant   the losses after the warm-ups while the learning rate has stayed at its peak (constant, or wsd before its
               decay)

Which steps these are is read from the rates of metrics.jsonl: config.yaml has the schedule of the last resume only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline import costs
from pipeline.checkpoint.metrics_log import METRICS_FILE, Row, read_backwards
from pipeline.checkpoint.run_files import CONFIG_FILE, RECORD_FILE
from pipeline.config import ModelConfig, ValidationConfig
from pipeline.layout import BatchConfig
from pipeline.probe_config import ProbeConfig
from pipeline.scaling.law import Points
from pipeline.scaling.run_folder import (
    read_colors,
    read_rates,
    read_record,
    read_section,
    read_settings,
    read_validations,
    steady_steps,
)
from pipeline.schedule import ScheduleConfig

if TYPE_CHECKING:
    from transformers import GPT2Config

Kind = Literal["decayed", "constant"]
EQUAL = ("palette", "resolution", "objective", "training data", "block", "augmentation", "dropout", "validation images")
"""What the runs of a fit have in common, in the order in which it is compared."""
NO_RATE = 0.01
"""Fraction of the peak up to which a learning rate has decayed."""


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
    rates: np.ndarray
    """Step and learning rate of each training row, oldest first: float64 (n, 2)."""
    seed: int
    precision: Literal["fp32", "bf16", "fp8"]
    probe: tuple[Any, ...]
    """What accuracies of the probe depend on: numbers of images and the set they are of."""
    trunk: Path
    """The run whose first steps this one has: of a branch the end of its chain of origins, else its own folder."""
    notes: list[str]
    """What could not be checked."""

    @cached_property
    def parameters(self) -> int:
        """All parameters, embeddings and head included."""
        return costs.parameter_count(self.shape)

    @cached_property
    def flops_per_image(self) -> float:
        """FLOPs of an image's forward and backward pass."""
        return costs.flops_per_token(self.shape) * self.shape.n_positions

    @property
    def objective(self) -> str:
        """objective.kind."""
        return getattr(self.shape, "objective", "next_color")

    @property
    def decays(self) -> bool:
        return self.schedule.decay != "constant"

    def rows(self, kind: Kind, min_images: int = 0) -> list[Row]:
        """The validation rows that a law of this kind describes, from this many images on."""
        return [row for row in self._rows(kind) if row["images"] >= min_images]

    def _rows(self, kind: Kind) -> list[Row]:
        if kind == "decayed":
            ends = self.decays and len(self.rates) > 0 and self.rates[-1, 1] <= NO_RATE * self.rates[:, 1].max()
            return [row for row in self.validations if ends and row["step"] == self.schedule.steps][-1:]
        first, last = steady_steps(self.rates)
        first = max(first, self.batch.warmup_steps)
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

    def groups(self) -> np.ndarray:
        """The group of each point, int64 (n,): runs that share steps are not independent of each other.

        Branches of one trunk share its steps. At a constant rate, so do runs of one size and seed.
        """
        keys = [
            (run.parameters, run.seed) if self.kind == "constant" else (str(run.trunk),) for run in self.runs
        ]  # fmt: skip
        return np.array([keys.index(key) for key in keys], dtype=int)[self.points.runs]

    def independent(self) -> Points:
        """The points with their groups in place of their runs."""
        return replace(self.points, runs=self.groups())

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
    record, settings = read_record(folder), read_settings(folder)
    _check_start(folder, settings)
    model = read_section(ModelConfig, settings, "model", folder)
    equal = _equal(folder, record, settings, model)
    schedule = read_section(ScheduleConfig, settings, "schedule", folder)
    validations = list(read_validations(folder))[::-1]
    if not validations:
        raise ValueError(
            f"{folder / METRICS_FILE} has no row with a finite valid_loss; a fit needs the runs' validation losses: "
            f"omit the run, or let it reach a multiple of validation.every_steps."
        )
    last = next(read_backwards(folder / METRICS_FILE, "step"), validations[-1])
    kind = (settings.get("objective") or {}).get("kind", "next_color")
    return Run(
        name, folder, model, schedule, read_section(BatchConfig, settings, "batch", folder),
        equal, gpt2_config(model, read_colors(folder), kind), validations, int(last["step"]), read_rates(folder),
        settings.get("seed", 0), settings.get("precision", "bf16"), _probe(settings, record["shards"]),
        *_trunk(folder, record, settings, equal),
    )  # fmt: skip


def _check_start(folder: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError if a run did not start from initial weights, and is not a branch of one that did."""
    start = settings.get("start") or {}
    if start.get("path") and not (start.get("moments") and start.get("position")):
        raise ValueError(
            f"{folder} started from the weights of {start['path']} (start.path); a scaling law describes runs from "
            f"initial weights, and branches of them with start.moments and start.position."
        )


def _trunk(
    folder: Path, record: dict[str, Any], settings: dict[str, Any], equal: dict[str, Any]
) -> tuple[Path, list[str]]:
    """Follows the origins of a decay branch to the run from initial weights, with a note if it can't be read.

    Raises ValueError if one of them can't be in a fit with the branch.
    """
    trunk, name = folder.resolve(), folder.name
    seen = {trunk}
    while (settings.get("start") or {}).get("path"):
        origin = record.get("origin") or {}
        found = Path(origin.get("run") or settings["start"]["path"])
        known = "run" in origin and origin["run"] is not None and found not in seen
        if not known or not (found / RECORD_FILE).is_file() or not (found / CONFIG_FILE).is_file():
            return found, [f"{name} is a branch of {found}, which can't be read: its data and its start are unchecked."]
        trunk, record, settings = found, read_record(found), read_settings(found)
        seen.add(trunk)
        _check_start(trunk, settings)
        theirs = _equal(trunk, record, settings, read_section(ModelConfig, settings, "model", trunk))
        for key in EQUAL[:-1]:  # the branch may be validated on other images
            if theirs[key] != equal[key]:
                raise ValueError(
                    f"{folder} has {key} {_shown(equal[key])}, but its trunk {trunk} has {_shown(theirs[key])}; a "
                    f"branch must have the {key} of its trunk: omit it."
                )
        step = origin.get("step") or 0
        rates = read_rates(trunk)
        before = rates[rates[:, 0] <= step]
        if len(before) and steady_steps(before)[1] < before[-1, 0]:
            raise ValueError(
                f"{folder} is a branch of {trunk} at step {step:,}, where the learning rate had left its peak; a "
                f"branch must begin at the peak rate: omit it."
            )
    return trunk, []


def _probe(settings: dict[str, Any], shards: dict[str, Any]) -> tuple[Any, ...]:
    """Numbers of images of the probe, and its set: a path, or the training data."""
    probe = settings.get("probe") or {}
    default = ProbeConfig()
    images = (probe.get(key, getattr(default, key)) for key in ("train_images", "test_images"))
    return *images, probe.get("shards") or _data_name(shards)


def _equal(folder: Path, record: dict[str, Any], settings: dict[str, Any], model: ModelConfig) -> dict[str, Any]:
    """The values under EQUAL. Raises ValueError if the training data changed within the run."""
    shards, history = record["shards"], record.get("mixture_history") or []
    if len(history) > 1:
        raise ValueError(
            f"{folder} changed its mixture at image {history[1]['images']:,} (mixture_history of {RECORD_FILE}); a "
            f"scaling law describes runs of one mixture: omit it."
        )
    objective, data, validation = (settings.get(key) or {} for key in ("objective", "data", "validation"))
    kind, masked = objective.get("kind", "next_color"), objective.get("mask_probability", 0.15)
    return {
        "palette": shards.get("palette_sha256"),
        "resolution": model.resolution,
        "objective": objective_name(kind, masked),
        "training data": _data_name(shards),
        "block": model.block,
        "augmentation": augmentation_name(data.get("flip", False), data.get("reflect_crop", 0)),
        "dropout": model.dropout,
        "validation images": validation.get("images", ValidationConfig().images),
    }


def _data_name(shards: dict[str, Any]) -> str:
    """The digest of the shard set; of a mixture those of all sets, with their weights."""
    sets = shards.get("mixture") or []
    return " + ".join(f"{one['weight']} x {one['digest'][:12]}" for one in sets) or shards["digest"]


def augmentation_name(flip: bool, reflect_crop: int) -> str:
    """How images are augmented."""
    return f"flip {flip}, reflect_crop {reflect_crop}"


def objective_name(kind: str, mask_probability: float) -> str:
    """An objective, with what its loss depends on."""
    return kind if kind == "next_color" else f"{kind} ({mask_probability} masked)"


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
    rows, notes = [], [note for run in runs for note in run.notes]
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
            return "it has no validation loss after its warm-up and before its learning rate left the peak"
        return f"its learning rate falls ({decay}) from the warm-up on, and this fit is of constant rates"
    if not run.decays:
        return "its learning rate is constant, and this fit is of decayed ends"
    if run.last_step < steps:
        return f"it is at step {run.last_step:,} of {steps:,}, and a run with decay {decay} counts at its end only"
    if not any(row["step"] == steps for row in run.validations):
        return f"it has no validation loss at its end, step {steps:,}"
    return f"its learning rate had not decayed at its end, step {steps:,}"


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
    """The points without those of the largest run and of runs that share its steps, and those that are excluded.

    Raises ValueError if too few are left.
    """
    groups = selected.groups()
    inside = groups != groups[selected.points.runs == selected.largest][0]
    rest, largest = selected.points.where(inside), selected.points.where(~inside)
    fitted = Selected(selected.kind, selected.runs, rest, selected.notes)
    require_enough(fitted, selected.runs[selected.largest].name)
    return fitted, Selected(selected.kind, selected.runs, largest, [])
