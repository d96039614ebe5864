"""The report: one self-contained file with the results of one model."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from shutil import copytree

import pytest
from sklearn.neighbors import NearestCentroid

from data_prep.shards.reader import ShardSet
from pipeline.evaluate.command import evaluate
from pipeline.evaluate.features.pooled import pooled_features
from pipeline.evaluate.registry import TASKS, Entry
from pipeline.evaluate.request import Command
from pipeline.model_folder.convert import load_model_folder
from pipeline.results.headline import accuracy_headlines
from pipeline.results.provenance import model_facts
from pipeline.results.report.page import write_report
from pipeline.results.report.sections import generic_section
from tests.pipeline.evaluate.tiny_sets import COLORS

QUICK = [
    "--linear_probe.l2", "[0.1]", "--low_data.l2", "[0.1]", "--low_data.subsets", "2", "--completions.images", "3",
    "--completions.samples", "2",
]  # fmt: skip
README = Path(__file__).parents[4] / "pipeline/evaluate/README.md"


class Page(HTMLParser):
    """Collects the addresses a page refers to, its headings, and whether its elements close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.headings: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self.addresses += [value or "" for key, value in attributes if key in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


@pytest.fixture(scope="module")
def trained_model(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder with the record of a training."""
    folder = tmp_path_factory.mktemp("model") / "trained"
    (folder / "training").mkdir(parents=True)
    for file in model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    rows = [{"step": step, "images": 16 * step, "loss": 3.2 / step**0.1} for step in range(1, 60)]
    rows[5]["loss"] = float("nan")
    rows.insert(30, {"step": 30, "images": 480, "valid_loss": 2.5})
    rows.append({"step": 59, "images": 944, "valid_loss": 2.25})
    (folder / "training/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "training/checkpoint.json").write_text(json.dumps({"step": 59, "images": 944, "shards_digest": "ab"}))
    start = {"command": ["python", "-m", "pipeline", "train", "--run", "<RUN>"]}
    (folder / "training/run.json").write_text(json.dumps({"shards": {"source": "dots & lines"}, "starts": [start]}))
    return folder


@pytest.fixture(scope="module")
def measure_all(shards_folder: Path, toy_network: Path) -> Callable[..., Path]:
    """Measures a model with every usual task and writes its report; returns the folder of results."""

    def measure(model: Path, out: Path, *arguments: str) -> Path:
        quick = [*QUICK, "--completions.feature_network", str(toy_network)]
        assert evaluate([str(model), "--shards", str(shards_folder), "--out", str(out), *quick, *arguments]) == 0
        return out

    return measure


@pytest.fixture(scope="module")
def out(trained_model: Path, measure_all: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of every usual task."""
    return measure_all(trained_model, tmp_path_factory.mktemp("measured") / "results")


def test_the_report_needs_no_other_file(out: Path) -> None:
    text = (out / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    figures = {"training.png", *(path.name for task in TASKS for path in out.glob(f"{task}*.png"))}
    assert len(page.addresses) == len(figures)
    assert {"density.png", "completions.png", "linear_probe.png"} <= figures
    assert all(address.startswith("data:image/png;base64,iVBOR") for address in page.addresses)
    assert "url(" not in text
    assert "$" not in re.sub(r"base64,[^\"]+", "", text)
    density, probe, completions = (
        json.loads((out / f"{task}.json").read_text()) for task in ("density", "linear_probe", "completions")
    )
    assert density["checkpoint_step"] == 59
    for shown in (
        f"{density['nats_per_color']:.4f}",
        f"{100 * probe['test_accuracy']:.1f} %",
        f"{completions['distance']['completions']:.3f}",
        "seed 0",
        "toy.pt",
        "944",
        "96.3 %",
        "2.0895",
        "EsViT",
    ):
        assert shown in text
    assert "dots &amp; lines" in text
    assert "--run &lt;RUN&gt;" in text


def test_the_page_can_be_read_by_everyone(out: Path) -> None:
    """With a screen reader, in the dark, on a telephone."""
    text = (out / "report.html").read_text()
    tags = Page(text).tags
    assert [tag for tag, _ in tags].count("main") == 1
    assert {attributes.get("scope") for tag, attributes in tags if tag == "th"} == {"col", "rowgroup"}
    alternatives = [attributes["alt"] or "" for tag, attributes in tags if tag == "img"]
    assert len(set(alternatives)) == len(alternatives) == 6
    density = json.loads((out / "density.json").read_text())
    probe = json.loads((out / "linear_probe.json").read_text())
    for words in (
        "over the images seen: from 3.200 to",
        "2.250 on the validation split",
        f"Figure of Linear probe: test accuracy {probe['test_accuracy']:.1%}",
        f"{density['nats_by_position'][0][0]:.4g} at the first pixel",
        "Grid of 3 rows, one per image of test: the given upper half, 2 completions",
    ):
        assert any(words in alternative for alternative in alternatives), words
    assert "@media (prefers-color-scheme: dark)" in text
    assert "overflow-wrap: anywhere" not in re.sub(r"pre {[^}]*}", "", text)


def test_the_head_and_the_notes_follow_from_the_results(out: Path) -> None:
    text = (out / "report.html").read_text()
    assert "It was trained on another shard set than it was measured on" in text  # its record names another digest
    assert "<dd>dots, 3 classes</dd>" in text
    assert "<dt>Precision</dt><dd>fp32</dd>" in text
    assert "(lower is better)" in text and "(higher is better)" in text
    assert "Few labels: layer and L2 strength by cross-validation within each subset&#39;s labels." in text
    probe = json.loads((out / "linear_probe.json").read_text())
    assert probe["color_histogram_test_accuracy"] > probe["test_accuracy"]  # the classes differ by color
    color = f"{100 * probe['color_histogram_test_accuracy']:.1f}"
    assert re.search(rf"<li>Linear probe, [^:]*: at least as good (is|are) [^<]*color histogram \({color} %\)", text)
    low, high = (100 * bound for bound in probe["test_accuracy_interval"])
    assert f"{100 * probe['test_accuracy']:.1f} % ({low:.1f}–{high:.1f})" in text
    assert '<td class="number">127</td>' in text  # n


def test_results_of_other_versions_are_excluded_and_named(
    trained_model: Path, shards: ShardSet, out: Path, tmp_path: Path
) -> None:
    out = copytree(out, tmp_path / "results")
    density, knn, low = (json.loads((out / f"{task}.json").read_text()) for task in ("density", "knn", "low_data"))
    (out / "density.json").write_text(json.dumps(density | {"version": 7}))
    (out / "knn.json").write_text(json.dumps({key: knn[key] for key in knn if key != "dataset_digest"}))
    (out / "completions.json").write_text("{")
    (out / "low_data.json").write_text(json.dumps(low | {"headlines": [{"name": "N", "unit": "nats"}]}))
    write_report(out, model_facts(trained_model, load_model_folder(trained_model)), shards)
    text = (out / "report.html").read_text()
    for words in (
        "<li>density.json: has version 7 of its format; this program reads up to 1</li>",
        "<li>knn.json: has no dataset_digest</li>",
        "<li>completions.json: is not readable as JSON",
        "<li>low_data.json: has other keys than this program knows (TypeError(",
    ):
        assert words in text, words
    assert Page(text).headings[:3] == ["The numbers", "Training", "Linear probe"]
    assert list(json.loads((out / "results.json").read_text())["tasks"]) == ["linear_probe"]


@pytest.mark.parametrize(("planned", "stated"), [(125, True), (59, False)])
def test_an_unfinished_training_is_stated_in_the_head(
    planned: int, stated: bool, trained_model: Path, shards: ShardSet, tmp_path: Path
) -> None:
    model = copytree(trained_model, tmp_path / "model")
    (model / "training/config.yaml").write_text(f"schedule: {{steps: {planned}}}\n")
    (tmp_path / "results").mkdir()
    facts = model_facts(model, load_model_folder(model))
    head = write_report(tmp_path / "results", facts, shards).read_text().partition("<h2>")[0]
    assert ("Its training was not finished: step 59 of 125." in head) == stated
    assert f"<dt>Training step</dt><dd>59 of {planned}</dd>" in head
    assert json.loads((tmp_path / "results/results.json").read_text())["model"]["planned_steps"] == planned
    (model / "training/config.yaml").write_text("- no keys")
    with pytest.raises(ValueError, match=r"config\.yaml has no keys and values; restore"):
        model_facts(model, load_model_folder(model))


def test_results_json_has_everything(out: Path) -> None:
    results = json.loads((out / "results.json").read_text())
    assert (results["format"], results["version"]) == ("image-gpt-results", 2)
    tasks = Command.tasks.split(",")
    assert results["tasks"] == {task: json.loads((out / f"{task}.json").read_text()) for task in tasks}
    assert results["random_weights"] == {}
    model = results["model"]
    assert (model["checkpoint_step"], model["images_seen"], model["valid_loss"]) == (59, 944, 2.25)
    assert model["objective"] == "next_color"
    assert results["dataset"]["images"] == {"train": 330, "valid": 110, "test": 130}
    assert {row["system"] for row in results["published"]} >= {"iGPT-L, from ImageNet", "MoCo", "AMDIM-L", "GPipe"}
    assert results["commands"][0] == "python -m pipeline train --run <RUN>"
    assert results["commands"][1].startswith("python -m pipeline evaluate ")


@pytest.mark.parametrize("named", [False, True])
def test_initial_weights_have_a_column(
    named: bool, trained_model: Path, measure_all: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "results"
    random_weights = tmp_path / "random_weights" if named else out / "random_weights"
    quick = ["--tasks", "density,linear_probe"]
    measure_all(trained_model, random_weights, *quick, "--weights", "random")
    measure_all(trained_model, out, *quick, *(["--random_weights", str(random_weights)] if named else []))
    results = json.loads((out / "results.json").read_text())
    untrained = results["random_weights"]
    assert set(untrained) == {"density", "linear_probe"}
    assert {result["weights"] for result in untrained.values()} == {"random"}
    row = next(line for line in (out / "report.html").read_text().split("<tr>") if "<td>Nats per color</td>" in line)
    numbers = re.findall(r'<td class="number">([^<]*)</td>', row)
    assert numbers[:2] == [f"{results['tasks']['density']['nats_per_color']:.4f}", f"{math.log(COLORS):.4f}"]


def test_initial_weights_of_another_model_have_none(
    trained_model: Path, model_folders: dict[str, Path], measure_all: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "results"
    measure_all(model_folders["gpt2"], out / "random_weights", "--tasks", "density", "--weights", "random")
    measure_all(trained_model, out, "--tasks", "density")
    assert json.loads((out / "results.json").read_text())["random_weights"] == {}


def test_what_was_not_measured_has_no_section(trained_model: Path, shards: ShardSet, tmp_path: Path) -> None:
    facts = model_facts(trained_model, load_model_folder(trained_model))
    (tmp_path / "results").mkdir()
    report = write_report(tmp_path / "results", facts, shards)
    assert Page(report.read_text()).headings == ["Training", "How to read this", "Commands"]
    write_report(tmp_path / "results", replace(facts, metrics=None), shards)
    assert Page(report.read_text()).headings == ["How to read this", "Commands"]


@pytest.mark.parametrize("some", [True, False])
def test_a_training_with_null_losses_has_a_report(
    some: bool, trained_model: Path, shards: ShardSet, tmp_path: Path
) -> None:
    """metrics.jsonl has null for NaN and Inf; without one finite loss there is no curve."""
    model = copytree(trained_model, tmp_path / "model")
    rows = [{"step": 1, "images": 16, "loss": 3.0}] if some else []
    rows += [
        {"step": 2, "images": 32, "loss": None, "grad_norm": None},
        {"step": 59, "images": 944, "valid_loss": None},
    ]
    (model / "training/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 60, "lo')
    (tmp_path / "results").mkdir()
    report = write_report(tmp_path / "results", model_facts(model, load_model_folder(model)), shards)
    assert ("Training" in Page(report.read_text()).headings) == some
    assert json.loads((tmp_path / "results/results.json").read_text())["model"]["valid_loss"] is None


def test_results_of_another_model_are_excluded(
    trained_model: Path,
    model_folders: dict[str, Path],
    shards: ShardSet,
    measure_all: Callable[..., Path],
    tmp_path: Path,
) -> None:
    out = measure_all(model_folders["gpt2"], tmp_path / "results", "--tasks", "density")
    (out / "notes.json").write_text("[1]")
    text = write_report(out, model_facts(trained_model, load_model_folder(trained_model)), shards).read_text()
    assert "of another model or shard set: density.json" in text
    assert "The numbers" not in Page(text).headings


def test_sections_are_in_the_given_order(trained_model: Path, shards: ShardSet, out: Path, tmp_path: Path) -> None:
    """The given sections come first; the other tasks follow with sections built from their JSON."""
    out = copytree(out, tmp_path / "results")
    sections = {"linear_probe": generic_section, "absent": generic_section, "density": lambda *_: "<p>own words</p>"}
    facts = model_facts(trained_model, load_model_folder(trained_model))
    text = write_report(out, facts, shards, sections=sections).read_text()
    headings = Page(text).headings
    assert headings[2:4] == ["Linear probe", "Density"]
    assert set(headings[4:7]) == {"k-NN", "Few labels", "Completions"}
    assert "<p>own words</p>" in text


def test_tasks_that_finish_at_once_are_all_in_the_report(
    trained_model: Path, shards: ShardSet, out: Path, tmp_path: Path
) -> None:
    """Another command holds the report while it leaves its result: the one that waited has it too."""
    out = copytree(out, tmp_path / "results")
    (out / "density.json").rename(tmp_path / "density.json")
    words = "import fcntl, os, sys, time; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); "
    words += "print('held', flush=True); time.sleep(1); os.rename(*sys.argv[2:])"
    arguments = [out / ".report.lock", tmp_path / "density.json", out / "density.json"]
    holder = subprocess.Popen([sys.executable, "-c", words, *map(str, arguments)], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    page = write_report(out, model_facts(trained_model, load_model_folder(trained_model)), shards)
    assert holder.wait() == 0
    assert "Density" in Page(page.read_text()).headings


@pytest.mark.parametrize(
    ("nats", "words"),
    [
        (3.5, "no better than the baseline of the previous color"),
        (2.8, "no better than the baseline of two neighboring colors"),
        (2.0, "structure beyond them"),
    ],
)
def test_how_to_read_follows_the_numbers(
    trained_model: Path, shards: ShardSet, out: Path, tmp_path: Path, nats: float, words: str
) -> None:
    out = copytree(out, tmp_path / "results")
    density = json.loads((out / "density.json").read_text())
    baselines = {"bigram_nats_per_color": 3.0, "left_times_above_nats_per_color": 2.5}
    (out / "density.json").write_text(json.dumps(density | baselines | {"nats_per_color": nats}))
    page = write_report(out, model_facts(trained_model, load_model_folder(trained_model)), shards)
    assert words in page.read_text()
    assert "few photographs" not in page.read_text()  # the images are dots
    assert "Its loss on test is" in page.read_text()


def test_a_new_task_is_a_file_and_a_line(
    trained_model: Path,
    measure_all: Callable[..., Path],
    evaluation_of: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The example in the README works as printed and appears in the report."""
    [block] = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    (tmp_path / "nearest_mean.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(TASKS, "nearest_mean", Entry("nearest_mean:NearestMean"))
    for layer in ("9", "-1"):
        with pytest.raises(ValueError, match=rf"nearest_mean\.layer is {layer}; it must be 0 to \d\."):
            measure_all(trained_model, tmp_path / "results", "--tasks", "nearest_mean", "--nearest_mean.layer", layer)
    out = measure_all(trained_model, tmp_path / "results", "--tasks", "nearest_mean", "--nearest_mean.layer", "1")
    result = json.loads((out / "nearest_mean.json").read_text())
    evaluation = evaluation_of(trained_model)
    train, test = (evaluation.images(name, labelled=True) for name in ("train", "test"))
    features = [pooled_features(evaluation, images)[1] for images in (train, test)]
    reference = NearestCentroid().fit(features[0], train.labels)
    assert result["test_accuracy"] == pytest.approx(reference.score(features[1], test.labels))
    text = (out / "report.html").read_text()
    assert "Nearest mean" in Page(text).headings
    assert f"{100 * result['test_accuracy']:.1f} %" in text


def test_a_section_of_lists_and_long_lists(tmp_path: Path) -> None:
    (tmp_path / "few.png").write_bytes(b"\x89PNG")
    result = {
        "task": "few",
        "command": "secret",
        "settings": [{"name": "4 a class", "test_accuracy": 0.25, "test_accuracy_deviation": 0.01, "subsets": [1]}],
        "layers": list(range(13)),
        "best": {"layer": 7, "rates": [0.1, 0.01]},
        "nothing": None,
        "summary": "better & worse",
        "headlines": [{"name": "Few", "value": 0.25, "unit": "accuracy"}],
    }
    shown = generic_section(result, tmp_path)
    for part in ("data:image/png", "<td>4 a class</td>", "best layer", "0.1, 0.01"):
        assert part in shown
    assert "<p>Better &amp; worse.</p>" in shown
    for part in ("secret", "layers", "subsets", "headlines", "unit"):
        assert part not in shown
    assert [(row.name, row.text) for row in accuracy_headlines(result, "Few")] == [("Few: 4 a class", "25.0 % ± 1.0")]
