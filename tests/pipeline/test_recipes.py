"""Every recipe opens with a description, fits on the accelerators that it names, and builds the published model."""

import re
from pathlib import Path

import pytest
import torch

from pipeline.command_line import parse_training
from pipeline.costs import flops_per_token
from pipeline.model.gpt import build_model
from pipeline.model.gpt_config import gpt2_config
from tests.benchmarks import recipe_scale
from tests.launch import ROOT, run

RECIPES = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.name != "demo.yaml")


def header(path: Path) -> str:
    lines = path.read_text().splitlines()
    return "\n".join(lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))])


def test_all_sizes_are_there() -> None:
    names = {path.stem for path in RECIPES}
    assert {"igpt_s", "igpt_m", "igpt_l", "igpt_xl", "igpt_l_48", "bert_s", "bert_l"} <= names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_a_lab_record(path: Path) -> None:
    text = header(path)
    for word in ("Model", "Schedule", "Cost", "Expect", "Fits", "Scale", "Command"):
        assert re.search(rf"^# {word} ", text, re.MULTILINE), word
    assert f"configs/{path.name}" in text
    assert "Chen et al., ICML 2020" in text


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_builds_the_published_model(path: Path) -> None:
    config, _ = parse_training(["--config", str(path), "--run", "RUN"])
    with torch.device("meta"):
        model = build_model(gpt2_config(config.model, 512, config.objective.kind))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert f"{parameters:,} parameters" in header(path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recommended_probes_cost_less_than_a_hundredth_of_the_training(path: Path, tmp_path: Path) -> None:
    """A recipe itself has none: they would refuse shard sets without labels."""
    line = re.search(r"^# (probe: \{.*\})  # on labelled shard sets; (\S+)% of", path.read_text(), re.MULTILINE)
    assert line
    assert not parse_training(["--config", str(path), "--run", "RUN"])[0].probe.every_steps
    (tmp_path / "recipe.yaml").write_text(f"{path.read_text()}\n{line[1]}\n")
    config, _ = parse_training(["--config", str(tmp_path / "recipe.yaml"), "--run", "RUN"])
    model, steps = gpt2_config(config.model, 512, config.objective.kind), config.schedule.steps
    training = config.batch.images_after(steps) * model.n_positions * flops_per_token(model)
    probes = config.probe.count(steps) * config.probe.flops(model, classes=1000)
    assert f"{probes / training:.2%}" == f"{line[2]}%"
    assert 0.001 < probes / training < 0.01


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_where_it_says(path: Path, tmp_path: Path) -> None:
    where = re.search(r"^# Fits +(\d+) x (\S+)", header(path), re.MULTILINE)
    assert where
    options = ["--config", path, "--accelerator", where[2], "--ranks", where[1]]
    finished = run(1, "-m", "pipeline", "plan", *options, logs=tmp_path)
    assert finished.codes == [0], finished.output


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_asks_for_no_more_accelerators_than_it_uses_well(path: Path) -> None:
    """In `Fits`, in the job script on nodes of 8, and in the page's table."""
    most = most_accelerators(path)
    where = re.search(r"^# Fits +(\d+) x", header(path), re.MULTILINE)
    assert where
    assert int(where[1]) <= most
    script = ROOT / f"slurm/pretrain_{path.stem.removeprefix('igpt_')}.sh"
    if script.exists():
        nodes = re.search(r"^#SBATCH --nodes=(\d+)", script.read_text(), re.MULTILINE)
        assert nodes
        assert 8 * int(nodes[1]) <= most
    if path.stem in recipe_scale.RECIPES:
        row = re.search(rf"^\| \[{path.stem}\].* (\d+) \|$", (ROOT / "configs/README.md").read_text(), re.MULTILINE)
        assert row
        assert int(row[1]) == most


def most_accelerators(path: Path) -> int:
    """The number in the header's line `Scale`."""
    scale = re.search(r"^# Scale +up to (\d+) H100s", header(path), re.MULTILINE)
    assert scale
    return int(scale[1])


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(name, marks=() if name == "igpt_l" else pytest.mark.slow) for name in recipe_scale.RECIPES],
)
def test_the_number_of_accelerators_that_a_recipe_uses_well_is_planned(recipe: str) -> None:
    most = most_accelerators(ROOT / f"configs/{recipe}.yaml")
    days_on = {number: recipe_scale.days(recipe, number) for number in recipe_scale.NUMBERS if number <= 2 * most}
    assert recipe_scale.used_well(days_on) == most


@pytest.mark.parametrize("size", ["s", "m", "l", "xl"])
def test_the_batch_divides_by_the_ranks_of_its_job_script(size: str) -> None:
    """On nodes of 8 accelerators."""
    script = (ROOT / f"slurm/pretrain_{size}.sh").read_text()
    nodes = re.search(r"^#SBATCH --nodes=(\d+)", script, re.MULTILINE)
    config, _ = parse_training(["--config", f"configs/igpt_{size}.yaml", "--run", "RUN"])
    assert nodes
    assert config.batch.accumulation_steps(config.parallel.data_ranks(8 * int(nodes[1]))) >= 1
