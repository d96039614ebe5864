"""The report: in one file, with what was found, without what is another model's."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from data_prep.shards import ShardSet
from pipeline.evaluate.provenance import model_facts
from pipeline.evaluate.report import summarised, write_report
from pipeline.evaluate.tasks import evaluate
from pipeline.model.huggingface import load_model_folder


class Page(HTMLParser):
    """Collects the addresses a page refers to, its headings, and whether its elements close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.headings: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for key, value in attributes if key in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


@pytest.fixture
def trained_model(model_folder: Path, tmp_path: Path) -> Path:
    """The model folder with the record of a training beside it."""
    folder = tmp_path / "trained"
    (folder / "training").mkdir(parents=True)
    for file in model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    rows = [{"step": step, "images": 16 * step, "loss": 3.2 / step**0.1} for step in range(1, 60)]
    rows[5]["loss"] = float("nan")
    rows.insert(30, {"step": 30, "images": 480, "valid_loss": 2.5})
    (folder / "training/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "training/checkpoint.json").write_text(json.dumps({"step": 59, "images": 944, "shards_digest": "ab"}))
    start = {"command": ["python", "-m", "pipeline", "train", "--run", "<RUN>"]}
    (folder / "training/run.json").write_text(json.dumps({"shards": {"source": "dots & lines"}, "starts": [start]}))
    return folder


def test_the_report_needs_no_other_file(trained_model: Path, shards_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    evaluate([str(trained_model), "--shards", str(shards_folder), "--out", str(out), "--linear_probe.l2", "[0.1]"])
    text = (out / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert len(page.addresses) == 3  # the curve, the completions, the probe
    assert all(address.startswith("data:image/png;base64,iVBOR") for address in page.addresses)
    assert "url(" not in text
    assert "$" not in re.sub(r"base64,[^\"]+", "", text)
    assert json.loads((out / "density.json").read_text())["checkpoint_step"] == 59
    density, probe = (json.loads((out / f"{task}.json").read_text()) for task in ("density", "linear_probe"))
    for shown in (
        f"{density['nats_per_color']:.4f}",
        f"{100 * probe['test_accuracy']:.1f} %",
        "944",
        "96.3 %",
        "2.0895",
    ):
        assert shown in text
    assert "dots &amp; lines" in text
    assert "--run &lt;RUN&gt;" in text


def test_what_was_not_measured_has_no_section(trained_model: Path, shards: ShardSet, tmp_path: Path) -> None:
    facts = model_facts(trained_model, load_model_folder(trained_model))
    (tmp_path / "results").mkdir()
    report = write_report(tmp_path / "results", facts, shards)
    assert Page(report.read_text()).headings == ["Training", "How to read this", "Commands"]
    write_report(tmp_path / "results", replace(facts, metrics=None), shards)
    assert Page(report.read_text()).headings == ["How to read this", "Commands"]


def test_results_of_another_model_are_left_out(
    trained_model: Path, model_folders: dict[str, Path], shards: ShardSet, shards_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "results"
    evaluate([str(model_folders["gpt2"]), "--shards", str(shards_folder), "--out", str(out), "--tasks", "density"])
    (out / "notes.json").write_text("[1]")
    text = write_report(out, model_facts(trained_model, load_model_folder(trained_model)), shards).read_text()
    assert "of another model or shard set: density.json" in text
    assert "The numbers" not in Page(text).headings


def test_the_curve_is_grouped_and_leaves_out_what_is_not_finite() -> None:
    random = np.random.default_rng(0)
    losses = random.uniform(1, 2, 1000)
    rows = [{"images": 10 * step, "loss": float(loss)} for step, loss in enumerate(losses, 1)]
    rows[7]["loss"] = float("inf")
    images, low, mean, high = summarised(rows)
    kept = np.delete(losses, 7)
    assert len(images) == 120
    assert (np.diff(images) > 0).all()
    assert (low <= mean).all()
    assert (mean <= high).all()
    assert (low.min(), high.max()) == (kept.min(), kept.max())
    assert mean.mean() == pytest.approx(kept.mean(), abs=2e-3)
