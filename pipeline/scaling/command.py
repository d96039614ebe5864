"""python -m pipeline scaling RUN ...: fits a scaling law over runs, and predicts losses and compute-optimal models."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from data_prep.common.command_line import fill, new_parser, parse
from pipeline import costs
from pipeline.config import TrainConfig
from pipeline.scaling.runs import (
    Run,
    Selected,
    augmentation_name,
    held_out,
    objective_name,
    read_runs,
    require_enough,
    select,
)
from pipeline.value_checks import require_at_least, require_positive

if TYPE_CHECKING:
    from pipeline.plan.layouts import Cluster
    from pipeline.scaling.bootstrap import Fitted
    from pipeline.scaling.budget import Family, Optimum
    from pipeline.scaling.report import Prediction

logger = logging.getLogger(__name__)


LISTS: dict[str, tuple[type, str]] = {
    "predict": (Path, "Configurations of `train` (YAML files) whose loss is predicted."),
    "budget_flops": (float, "Training FLOPs for which the compute-optimal model and number of images are printed."),
    "budget_gpu_hours": (float, "GPU-hours for which they are printed; needs --gpu."),
    "results": (Path, "Folders of `evaluate` with linear_probe: accuracies beside those of the runs' probes."),
}
"""Options that take several values, with the type of each and their help."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """What to fit and to predict, and where to write it."""

    predict: list[Path]
    budget_flops: list[float]
    budget_gpu_hours: list[float]
    results: list[Path]
    out: Path
    """The folder for the figures, the page and the numbers."""
    points: Literal["auto", "decayed", "constant"] = "auto"
    """The losses of the fit. decayed: the ends of runs with decay cosine, linear or wsd; constant: the losses at a
    constant learning rate after the warm-up. auto: decayed if they are enough for a fit, else constant."""
    min_images: int = 0
    """Losses of fewer images are excluded: the first ones at a constant learning rate follow no power law."""
    gpu: str | None = None
    """The accelerator of budget_gpu_hours, as in `plan --accelerator`; its speed is the one that `plan` estimates."""
    ranks: int = 8
    """Number of accelerators on which budget_gpu_hours are spent, 8 in each node."""
    resamples: int = 200
    """Resamples of the bootstrap for the 95% intervals."""

    def __post_init__(self) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"--out is {self.out}, which is a file; it must be a folder.")
        for key in ("budget_flops", "budget_gpu_hours"):
            for budget in getattr(self, key):
                require_positive(f"--{key}", budget)
        if self.budget_gpu_hours and self.gpu is None:
            raise ValueError(f"--gpu is not set; with --budget_gpu_hours it must be one of {_known()}.")
        if self.gpu is not None and not self.budget_gpu_hours:
            raise ValueError(f"--gpu is {self.gpu}, and only --budget_gpu_hours uses it; set both or neither.")
        if self.gpu not in (None, "cpu", *costs.ACCELERATORS):
            raise ValueError(f"--gpu is {self.gpu!r}; it must be one of {_known()}.")
        require_at_least("--min_images", self.min_images, 0)
        require_at_least("--ranks", self.ranks, 1)
        require_at_least("--resamples", self.resamples, 50)


def _known() -> str:
    return ", ".join([*costs.ACCELERATORS, "cpu"])


def scaling_command(arguments: list[str]) -> int:
    """Fits, predicts and writes. Raises ValueError for invalid input, before anything is written."""
    parser = new_parser(
        "python -m pipeline scaling",
        "Fits L(N, D) = E + A / N^alpha + B / D^beta to the validation losses of runs, and predicts with it.",
    )
    parser.add_argument("runs", nargs="+", type=Path, help="Folders of runs that differ in size and images.")
    for key, (kind, text) in LISTS.items():
        parser.add_argument(f"--{key}", nargs="+", type=kind, default=[], help=text)
    parser.add_class_arguments(Command, skip=set(LISTS))
    parsed = parse(parser, arguments)
    command = fill(Command, parsed)
    configs = {str(path): _read_config(path) for path in command.predict}  # before the runs, which take longer
    runs = read_runs(parsed.runs)
    for path, config in configs.items():
        _require_same_kind(path, config, runs[0])
    selected = select(runs, None if command.points == "auto" else command.points, command.min_images)
    require_enough(selected)
    trained = runs[0].equal["training data"]
    selected.notes.extend(
        f"{path} is taken as one of the runs' training data, {trained[:12] if len(trained) == 64 else trained}: its "
        f"shard sets are not read."
        for path in configs
    )
    fitted_part, largest = held_out(selected)
    for note in selected.notes:
        logger.warning(note)
    _fit_and_write(command, runs, selected, fitted_part, largest, configs)
    return os.EX_OK


def _fit_and_write(
    command: Command,
    runs: Sequence[Run],
    selected: Selected,
    fitted_part: Selected,
    largest: Selected,
    configs: dict[str, TrainConfig],
) -> None:
    from pipeline.scaling.accuracy import read_accuracies
    from pipeline.scaling.bootstrap import fit_with_resamples
    from pipeline.scaling.budget import family, flops_of
    from pipeline.scaling.report import Study, hold_out_of, write_study

    accuracies, notes = read_accuracies(runs, command.results)
    selected.notes.extend(notes)
    without = fit_with_resamples(fitted_part.independent(), command.resamples)
    fitted = fit_with_resamples(selected.independent(), command.resamples)
    sizes = family(selected.runs, flops_of, smooth=True)
    assert sizes is not None
    study = Study(
        selected,
        fitted,
        hold_out_of(without, fitted_part, largest),
        [_predict(path, config, selected, fitted) for path, config in configs.items()],
        _optima(command, selected, fitted, sizes, configs),
        accuracies,
    )
    write_study(study, sizes, command.out)


def _read_config(path: Path) -> TrainConfig:
    """Raises ValueError that names the file."""
    if not path.is_file():
        raise ValueError(f"--predict is {path}, which is not a file; it must be a YAML file of `train`, see configs/.")
    parser = new_parser("python -m pipeline train", "")
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(TrainConfig)
    try:
        return fill(TrainConfig, parse(parser, ["--config", str(path)]))
    except ValueError as error:
        text = str(error).removesuffix(" (see python -m pipeline train --help)").rstrip(".")
        raise ValueError(text + "." if str(path) in text else f"--predict {path}: {text}.") from error


def _require_same_kind(path: str, config: TrainConfig, run: Run) -> None:
    """Raises ValueError if a configuration's loss is not one that the law of these runs describes."""
    data = config.data
    wanted = {
        "resolution": ("model.resolution", config.model.resolution),
        "objective": ("objective", objective_name(config.objective.kind, config.objective.mask_probability)),
        "block": ("model.block", config.model.block),
        "dropout": ("model.dropout", config.model.dropout),
        "augmentation": ("augmentation", augmentation_name(data.flip, data.reflect_crop)),
    }
    for key, (option, value) in wanted.items():
        if value != run.equal[key]:
            raise ValueError(
                f"--predict {path} has {option} {value}, but the runs have {run.equal[key]}; a prediction must be of "
                f"the same {key}."
            )


def _predict(path: str, config: TrainConfig, selected: Selected, fitted: "Fitted") -> "Prediction":
    from pipeline.model.gpt_config import gpt2_config
    from pipeline.scaling.report import Prediction

    run = selected.runs[0]
    shape = gpt2_config(config.model, run.shape.colors, config.objective.kind)
    parameters, images = costs.parameter_count(shape), config.batch.images_after(config.schedule.steps)
    flops = costs.flops_per_token(shape) * shape.n_positions * images
    decays = config.schedule.decay != "constant"
    return Prediction(
        path, parameters, images, flops, fitted.prediction(parameters, images), flops / float(selected.flops().max()),
        decays == (selected.kind == "decayed"),
    )  # fmt: skip


def _optima(
    command: Command, selected: Selected, fitted: "Fitted", by_flops: "Family", configs: dict[str, TrainConfig]
) -> list["Optimum"]:
    from pipeline.scaling.budget import family, fastest_layout, gpu_seconds_of, optimum

    found = [optimum(fitted, by_flops, budget, "FLOP") for budget in command.budget_flops]
    if command.budget_gpu_hours:
        run = selected.runs[selected.largest]
        config = next(iter(configs.values()), TrainConfig(model=run.model, batch=run.batch, precision=run.precision))
        cluster = _cluster(command)
        by_hours = family(selected.runs, gpu_seconds_of(config, cluster), smooth=False)
        if by_hours is None:
            raise ValueError(
                f"--ranks is {command.ranks}; no layout of batch.global_size {config.batch.global_size} divides or "
                f"fits on so many {command.gpu}: choose a divisor of the batch."
            )
        for budget in command.budget_gpu_hours:
            best = optimum(fitted, by_hours, budget, "GPU-hours")
            layout = fastest_layout(config, cluster, best.nearest.model, run)
            assert layout is not None
            training = f"batch {config.batch.global_size}, {config.precision}, {layout.name()}"
            found.append(replace(best, training=training))
    return found


def _cluster(command: Command) -> "Cluster":
    from pipeline.plan.hardware import CPU, hardware_of
    from pipeline.plan.layouts import Cluster

    assert command.gpu is not None
    accelerator = CPU if command.gpu == "cpu" else costs.ACCELERATORS[command.gpu]
    return Cluster(accelerator, command.ranks, 8, hardware_of(accelerator))
