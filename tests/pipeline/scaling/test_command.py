"""`python -m pipeline scaling` on run folders of a known law: what it finds, writes and refuses."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline import costs
from pipeline.checkpoint.metrics_log import to_line
from pipeline.config import ModelConfig, ObjectiveConfig, TrainConfig, to_dict
from pipeline.model.gpt_config import gpt2_config
from pipeline.scaling.accuracy import Probed, rank_correlation, read_accuracies
from pipeline.scaling.bootstrap import fit_with_resamples
from pipeline.scaling.command import scaling_command
from pipeline.scaling.figures import draw_accuracy
from pipeline.scaling.law import fit
from pipeline.scaling.report import hold_out_of
from pipeline.scaling.runs import held_out, read_runs, select
from pipeline.schedule import learning_rate_at
from tests.pipeline.scaling.synthetic import TRUE, WARMUP, change_json, config_of, parameters_of, write_grid, write_run

BUDGETS = (200, 600, 2000, 6000, 20000)
FILES = {"loss_by_flops.png", "loss_by_images.png", "isoflops.png", "scaling.md", "scaling.json"}


@pytest.fixture
def runs(grid: list[Path], tmp_path: Path) -> Callable[[], list[Path]]:
    """Copies of eight runs, two of each of four sizes, to be changed."""

    def copy() -> list[Path]:
        chosen = [run for run in grid if run.name.endswith(("-2000", "-6000"))][:8]
        return [Path(shutil.copytree(run, tmp_path / run.name)) for run in chosen]

    return copy


def scaling(runs: list[Path], out: Path, *options: str) -> dict[str, Any]:
    assert scaling_command([*map(str, runs), "--out", str(out), "--resamples", "50", *options]) == 0
    return json.loads((out / "scaling.json").read_text())


def add_probes(run: Path, best: float) -> None:
    with (run / "metrics.jsonl").open("a") as rows:
        for step in (5000, 10000, 20000):
            rows.write(to_line({"step": step, "images": 64 * step, "probe_accuracy": best * step / 20000}))


def test_the_law_of_synthetic_runs(grid: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "next.yaml"
    config = config_of(16, 512, 40000)
    target.write_text(yaml.safe_dump(to_dict(config)))
    others = [write_run(tmp_path / "stopped", config_of(4, 96, 6000), last=3000)]
    found = scaling([*grid, *others], tmp_path / "out", "--predict", str(target), "--budget_flops", "1e16", "1e17")
    law = found["law"]
    assert law["E"]["value"] == pytest.approx(TRUE.E, rel=0.01)
    assert law["alpha"]["value"] == pytest.approx(TRUE.alpha, abs=0.03)
    assert law["beta"]["value"] == pytest.approx(TRUE.beta, abs=0.03)
    assert found["kind"] == "decayed" and len(found["points"]) == len(grid)
    assert {file.name for file in (tmp_path / "out").iterdir()} == FILES

    held = found["held_out"]
    assert held["run"] == "l12-w384-20000" and abs(held["error"]) < 0.01
    assert held["error"] == pytest.approx(held["predicted"]["value"] / held["measured"] - 1)

    prediction = found["predictions"][0]
    true = float(TRUE.loss(parameters_of(config), 64 * 40000))
    assert prediction["loss"]["low"] < true < prediction["loss"]["high"]
    assert prediction["loss"]["value"] == pytest.approx(true, rel=0.005)

    small, large = found["optima"]
    for optimum in (small, large):
        model = ModelConfig(**optimum["nearest"]["model"])
        flops = costs.flops_per_token(gpt2_config(model)) * 256 * optimum["nearest_images"]
        assert flops == pytest.approx(optimum["budget"])
        assert optimum["loss"]["value"] < float(
            TRUE.loss(3 * optimum["parameters"]["value"], optimum["images"]["value"] / 3)
        )
    grown = np.log(large["parameters"]["value"] / small["parameters"]["value"]) / np.log(10)
    assert grown == pytest.approx(TRUE.beta / (TRUE.alpha + TRUE.beta), abs=0.03)

    output = capsys.readouterr().out
    assert f"error {held['error']:+.2%}" in output
    assert (
        "note: stopped is skipped: it is at step 3,000 of 6,000, and a run with decay cosine counts at its end only."
        in output
    )
    assert str(target) in output


def test_a_constant_rate_gives_many_points_and_warm_up_and_decay_none(tmp_path: Path) -> None:
    selected = select(read_runs(write_grid(tmp_path, (6000,), 0.001, decay="wsd")), None)
    assert selected.kind == "constant", "one number of images is not enough for a fit of ends"
    images = selected.points.images
    assert images.min() > 64 * WARMUP and images.max() == 64 * 5400, "the decay begins at step 5,400"
    assert abs(fit(selected.points).E / TRUE.E - 1) < 0.02, "losses of the decay are 3% lower"
    assert select(selected.runs, "constant", 100_000).points.images.min() >= 100_000
    ends = select(selected.runs, "decayed")
    assert set(ends.points.images) == {64 * 6000} and len(ends.points) == 7


def test_accuracy_against_loss(grid: list[Path], tmp_path: Path) -> None:
    folders = [Path(shutil.copytree(run, tmp_path / run.name)) for run in grid if run.name.endswith("-20000")]
    for place, folder in enumerate(folders):
        add_probes(folder, 0.3 + 0.05 * place)
    accuracies, notes = read_accuracies(read_runs(folders), [])
    assert not notes
    assert len(accuracies) == 21
    assert rank_correlation(accuracies) == pytest.approx(spearman(accuracies))
    middle = accuracies[1]
    assert (middle.step, middle.accuracy) == (10000, 0.15)
    assert middle.valid_loss == pytest.approx(1.05 * TRUE.loss(middle.parameters, 640_000), rel=0.01)
    draw_accuracy(accuracies, tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    change_config(folders[1], "probe", every_steps=5000, train_images=100)
    other, notes = read_accuracies(read_runs(folders), [])
    assert (
        other == []
        and "excluded: they are of other images" in notes[0]
        and f"{folders[1].name} 100, 2000 of" in notes[0]
    )


def spearman(accuracies: list[Probed]) -> float:
    """Pearson's correlation of the ranks; equal accuracies share a rank."""
    losses, fractions = (np.array([getattr(one, key) for one in accuracies]) for key in ("valid_loss", "accuracy"))
    ranks = [[np.mean(np.flatnonzero(np.sort(each) == value)) for value in each] for each in (losses, fractions)]
    return float(np.corrcoef(*ranks)[0, 1])


Broken = Callable[[list[Path]], list[str]]


def change_config(run: Path, section: str, **values: Any) -> None:
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings[section] = (settings.get(section) or {}) | values
    (run / "config.yaml").write_text(yaml.safe_dump(settings))


def without(run: Path, key: str) -> None:
    """Removes the rows with a key."""
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(row for row in rows if key not in row))


def predicted(runs: list[Path], **changed: Any) -> list[str]:
    path = runs[0].parent / "config.yaml"
    path.write_text(yaml.safe_dump(to_dict(replace(config_of(2, 32, 200), **changed))))
    return ["--predict", str(path)]


def nothing(_made: object) -> list[str]:
    return []


def note(run: Path, **values: Any) -> None:
    """Changes keys of run.json."""
    path = run / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def branch(runs: list[Path], at: int, which: int = 1) -> Path:
    """Makes a run a branch of a new wsd trunk of 2,000 steps, which decays from 1,800 on."""
    trunk = runs[0].parent / "trunk"
    if not trunk.exists():
        write_run(trunk, config_of(2, 32, 2000, "wsd"))
    change_config(runs[which], "start", path=f"{trunk}/checkpoints/step-{at}", moments=True, position=True)
    note(runs[which], origin={"run": str(trunk.resolve()), "step": at, "images": 64 * at})
    return trunk


MIXTURE = [{"digest": "c" * 64, "weight": 0.7}, {"digest": "d" * 64, "weight": 0.3}]
BAD: dict[str, tuple[Broken, str]] = {
    "palette": (
        lambda runs: nothing(change_json(runs[2] / "run.json", palette_sha256="b" * 64)),
        "{2} has palette bbbbbbbbbbbb, but {0} has aaaaaaaaaaaa; the losses of one fit must be of the same palette.",
    ),
    "resolution": (
        lambda runs: nothing(change_config(runs[3], "model", resolution=32)),
        "{3} has resolution 32, but {0} has 16; the losses of one fit must be of the same resolution.",
    ),
    "objective": (
        lambda runs: nothing(change_config(runs[1], "objective", kind="masked_color")),
        "{1} has objective masked_color (0.15 masked), but {0} has next_color; the losses of one fit must be of the "
        "same objective.",
    ),
    "data": (
        lambda runs: nothing(change_json(runs[1] / "run.json", digest="c" * 64)),
        "{1} has training data cccccccccccc, but {0} has dddddddddddd; the losses of one fit must be of the same "
        "training data.",
    ),
    "validation images": (
        lambda runs: nothing(change_config(runs[1], "validation", images=64)),
        "{1} has validation images 64, but {0} has 5120; the losses of one fit must be of the same validation images.",
    ),
    "start": (
        lambda runs: nothing(change_config(runs[1], "start", path="other/run", moments=True, position=False)),
        "{1} started from the weights of other/run (start.path); a scaling law describes runs from initial weights, "
        "and branches of them with start.moments and start.position.",
    ),
    "mixture": (
        lambda runs: nothing(change_json(runs[1] / "run.json", mixture=MIXTURE)),
        "{1} has training data 0.7 x cccccccccccc + 0.3 x dddddddddddd, but {0} has dddddddddddd; the losses of one "
        "fit must be of the same training data.",
    ),
    "a mixture that changed": (
        lambda runs: nothing(note(runs[1], mixture_history=[{"images": 0, "sets": []}, {"images": 6400, "sets": []}])),
        "{1} changed its mixture at image 6,400 (mixture_history of run.json); a scaling law describes runs of one "
        "mixture: omit it.",
    ),
    "a trunk of other data": (
        lambda runs: nothing(change_json(branch(runs, at=1000) / "run.json", digest="c" * 64)),
        "{1} has training data dddddddddddd, but its trunk {trunk} has cccccccccccc; a branch must have the training "
        "data of its trunk: omit it.",
    ),
    "a branch of a decayed rate": (
        lambda runs: nothing(branch(runs, at=1950)),
        "{1} is a branch of {trunk} at step 1,950, where the learning rate had left its peak; a branch must begin at "
        "the peak rate: omit it.",
    ),
    "no run": (
        lambda runs: nothing((runs[1] / "run.json").unlink()),
        "{1} has no run.json; it must be the folder of a run that was started.",
    ),
    "damaged record": (
        lambda runs: nothing((runs[1] / "run.json").write_text("{}")),
        "{1}/run.json is damaged: it has no record of a run's shard set; restore it from a copy.",
    ),
    "damaged config": (
        lambda runs: nothing((runs[1] / "config.yaml").write_text("model: {layers: 0, width: 8, heads: 1}")),
        "{1}/config.yaml is damaged in model (model.layers is 0; it must be at least 1.); restore it from a copy.",
    ),
    "no palette file": (
        lambda runs: nothing((runs[1] / "palette.npy").unlink()),
        "{1}/palette.npy can't be read; copy it from the run's shard set, whose palette it is.",
    ),
    "no validation": (
        lambda runs: nothing(without(runs[1], "valid_loss")),
        "{1}/metrics.jsonl has no row with a finite valid_loss; a fit needs the runs' validation losses: omit the "
        "run, or let it reach a multiple of validation.every_steps.",
    ),
    "twice": (
        lambda runs: nothing(runs.append(runs[0])),
        "{0} is given twice; give each run once.",
    ),
    "too few sizes": (
        lambda runs: nothing([runs.pop() for _ in range(4)]),
        "the runs have 4 losses of 2 model sizes at the ends of decaying runs; a fit needs at least 6 losses of 3 "
        "sizes: give more runs.",
    ),
    "too few without the largest": (
        lambda runs: nothing([runs.pop() for _ in range(2)]),
        "the runs have 5 losses of 3 model sizes at the ends of decaying runs without l4-w64-6000, the largest, which "
        "is held out; a fit needs at least 6 losses of 3 sizes without it: give more runs.",
    ),
    "prediction at another resolution": (
        lambda runs: predicted(runs, model=replace(config_of(2, 32, 200).model, resolution=32)),
        "--predict {parent}/config.yaml has model.resolution 32, but the runs have 16; a prediction must be of the "
        "same resolution.",
    ),
    "prediction of another objective": (
        lambda runs: predicted(runs, objective=ObjectiveConfig(kind="masked_color")),
        "--predict {parent}/config.yaml has objective masked_color (0.15 masked), but the runs have next_color; a "
        "prediction must be of the same objective.",
    ),
    "prediction with dropout": (
        lambda runs: predicted(runs, model=replace(config_of(2, 32, 200).model, dropout=0.1)),
        "--predict {parent}/config.yaml has model.dropout 0.1, but the runs have 0.0; a prediction must be of the same "
        "dropout.",
    ),
    "no configuration": (
        lambda runs: ["--predict", "missing.yaml"],
        "--predict is missing.yaml, which is not a file; it must be a YAML file of `train`, see configs/.",
    ),
    "budget": (
        lambda runs: ["--budget_flops", "1e15", "-1"],
        "--budget_flops is -1.0; it must be above 0, and finite.",
    ),
    "no accelerator": (
        lambda runs: ["--budget_gpu_hours", "10"],
        "--gpu is not set; with --budget_gpu_hours it must be one of a100-40gb, a100-80gb, h100-pcie-80gb, h100-80gb, "
        "h200-141gb, b200-180gb, l40s-48gb, l4-24gb, a10-24gb, mi300x-192gb, cpu.",
    ),
    "unused accelerator": (
        lambda runs: ["--gpu", "h100-80gb"],
        "--gpu is h100-80gb, and only --budget_gpu_hours uses it; set both or neither.",
    ),
    "out is a file": (
        lambda runs: ["--out", str(runs[0] / "run.json")],
        "--out is {0}/run.json, which is a file; it must be a folder.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_invalid_input_is_one_sentence_and_writes_nothing(
    name: str, runs: Callable[[], list[Path]], tmp_path: Path
) -> None:
    change, sentence = BAD[name]
    folders = runs()
    given = [str(folder) for folder in folders]
    options = change(folders)
    with pytest.raises(ValueError) as error:
        scaling_command([*map(str, folders), "--out", str(tmp_path / "out"), *options])
    assert str(error.value) == sentence.format(*given, parent=tmp_path, trunk=(tmp_path / "trunk").resolve())
    assert not (tmp_path / "out").exists()


def test_one_number_of_images_is_refused(tmp_path: Path) -> None:
    runs = write_grid(tmp_path, (2000,), 0.001)
    with pytest.raises(
        ValueError, match=r"no size that was trained on different numbers of images.*other schedule\.steps"
    ):
        scaling_command([*map(str, runs), "--out", str(tmp_path / "out")])


def test_a_decay_branch_counts_with_the_images_of_its_trunk(runs: Callable[[], list[Path]]) -> None:
    folders = runs()
    change_config(folders[1], "start", path="trunk/checkpoints/step-00001000", moments=True, position=True)
    selected = select(read_runs(folders), "decayed")
    assert len(selected.points) == 8
    name = folders[1].name
    assert selected.notes == [
        f"{name} is a branch of trunk/checkpoints/step-00001000, which can't be read: its data and its start are "
        f"unchecked."
    ]


def test_branches_of_one_trunk_are_held_out_together_and_drawn_together(runs: Callable[[], list[Path]]) -> None:
    folders = runs()
    for which in (6, 7):
        branch(folders, at=1000, which=which)
    selected = select(read_runs(folders), "decayed")
    groups = selected.groups()
    assert groups[6] == groups[7] and len(set(groups)) == 7
    assert len(selected.independent()) == 8 and set(selected.independent().runs) == set(groups)
    rest, largest = held_out(selected)
    assert (len(rest.points), len(largest.points)) == (6, 2)
    law = fit_with_resamples(rest.points, 50)
    assert hold_out_of(law, rest, largest).also == [folders[6].name]


def append_rows(run: Path, config: TrainConfig, first: int) -> None:
    """Resumes a run with another schedule, which config.yaml has from then on."""
    (run / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    with (run / "metrics.jsonl").open("a") as rows:
        for step in range(first + 50, config.schedule.steps + 1, 50):
            rate = learning_rate_at(step, 1e-3, config.schedule)
            rows.write(to_line({"step": step, "images": 64 * step, "loss": 2.5, "learning_rate": rate}))
            rows.write(to_line({"step": step, "images": 64 * step, "valid_loss": 2.5}))


def test_losses_of_an_earlier_schedule_are_taken_by_the_rates_that_were_used(tmp_path: Path) -> None:
    run = write_run(tmp_path / "wsd", config_of(2, 32, 1000, "wsd"))
    append_rows(run, config_of(2, 32, 2000, "wsd"), 1000)
    resumed = read_runs([run])[0]
    assert [row["step"] for row in resumed.rows("constant")] == list(range(100, 901, 50))
    assert [row["step"] for row in resumed.rows("decayed")] == [2000]
    run = write_run(tmp_path / "cosine", config_of(2, 32, 1000, "cosine"))
    append_rows(run, config_of(2, 32, 2000, "constant"), 1000)
    assert read_runs([run])[0].rows("constant") == [] == read_runs([run])[0].rows("decayed")
    run = write_run(tmp_path / "shortened", config_of(2, 32, 1000, "constant"))
    (run / "config.yaml").write_text(yaml.safe_dump(to_dict(config_of(2, 32, 1000, "cosine"))))
    assert read_runs([run])[0].rows("decayed") == [], "its rate had not decayed at step 1,000"


@pytest.mark.slow
def test_a_million_steps_are_read_in_seconds(grid: list[Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(grid[0], tmp_path / "long"))
    row = {"loss": 2.5, "learning_rate": 1e-3, "grad_norm": 0.5, "applied": True, "images_per_second": 1234.5}
    with (run / "metrics.jsonl").open("w") as rows:
        for step in range(1, 1_000_001):
            rows.write(to_line({"step": step, "images": 64 * step} | row))
            if step % 5000 == 0:
                rows.write(to_line({"step": step, "images": 64 * step, "valid_loss": 2.5}))
    start = time.process_time()
    assert len(read_runs([run])[0].validations) == 200
    assert time.process_time() - start < 10
