"""Compute-optimal sizes for a budget: what a size costs."""

import re
from pathlib import Path

import numpy as np
import pytest

from pipeline import costs
from pipeline.config import ObjectiveConfig
from pipeline.model.gpt_config import gpt2_config
from pipeline.plan.command import plan_command
from pipeline.plan.hardware import hardware_of
from pipeline.plan.layouts import Cluster
from pipeline.scaling.bootstrap import Fitted
from pipeline.scaling.budget import family, flops_of, gpu_seconds_of
from pipeline.scaling.command import Command, _optima
from pipeline.scaling.runs import read_runs, select
from tests.pipeline.scaling.synthetic import TRUE, config_of, write_run


def test_sizes_of_a_masked_family_cost_what_the_runs_cost(tmp_path: Path) -> None:
    objective = ObjectiveConfig(kind="masked_color")
    made = [write_run(tmp_path / f"w{width}", config_of(2, width, 200, objective=objective)) for width in (32, 64)]
    for run in read_runs(made):
        assert flops_of(run.model, run) == run.flops_per_image
    candidate = family(read_runs(made), flops_of, smooth=False)
    assert candidate is not None
    one = candidate.candidates[40]
    shape = gpt2_config(one.model, 512, "masked_color")
    assert one.parameters == costs.parameter_count(shape)
    assert one.cost == costs.flops_per_token(shape) * shape.n_positions


def test_gpu_hours_are_those_of_the_largest_runs_batch_and_precision(grid: list[Path], tmp_path: Path) -> None:
    runs = read_runs(grid[-15:])
    selected = select(runs, "decayed")
    command = Command(
        predict=[], budget_flops=[], budget_gpu_hours=[10.0], results=[], out=tmp_path / "out", gpu="h100-80gb", ranks=1
    )
    fitted = Fitted(TRUE, [], np.zeros(1))
    sizes = family(runs, flops_of, smooth=True)
    assert sizes is not None
    best = _optima(command, selected, fitted, sizes, {})[0]
    assert best.training.startswith("batch 64, bf16, ZeRO-")


def test_gpu_seconds_are_those_of_the_fastest_layout_of_plan(
    grid: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = read_runs(grid[-1:])[0]
    cluster = Cluster(costs.ACCELERATORS["h100-80gb"], 2, 8, hardware_of(costs.ACCELERATORS["h100-80gb"]))
    config = config_of(12, 384, 200)
    seconds = gpu_seconds_of(config, cluster)(config.model, run)
    options = ["--model.layers", "12", "--model.width", "384", "--model.heads", "6", "--model.resolution", "16"]
    batch = ["--batch.global_size", "64", "--schedule.steps", "200", "--schedule.warmup_steps", "20"]
    assert plan_command(["--accelerator", "h100-80gb", "--ranks", "2", *options, *batch]) == 0
    fastest = re.search(r"layouts that fit, by estimated speed\n +([\d.]+) s", capsys.readouterr().out)
    assert fastest and seconds == pytest.approx(float(fastest[1]) * 2 / 64, abs=0.0005 * 2 / 64 * 1.01)
