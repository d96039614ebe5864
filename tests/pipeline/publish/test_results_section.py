"""The results in the card, from fabricated results: baselines, versions, and numbers that are missing."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.publish.assemble import check_results
from pipeline.publish.results_section import card_sections, eval_results
from pipeline.results.schema import read_results

PROVENANCE = {
    "inputs_digest": "c", "model_digest": "a", "dataset": "dots", "dataset_digest": "ours", "command": "evaluate",
}  # fmt: skip
PROBE = {
    "task": "linear_probe", "test_images": 50, "best_layer": 2, "test_accuracy": 0.5,
    "test_accuracy_interval": [0.366, 0.634], "raw_pixel_test_accuracy": 0.4, "color_histogram_test_accuracy": 0.6,
    "majority_class_test_accuracy": 0.1, "title": "Linear probe", "summary": "test accuracy 50.0%",
    "headlines": [{"name": "Linear probe", "value": 0.5, "unit": "accuracy", "interval": [0.366, 0.634],
                   "detail": "layer 2", "measure": "Linear probe, test accuracy"}],
}  # fmt: skip
DENSITY = {
    "task": "density", "split": "train", "images": 30, "masked": False, "nats_per_color": 2.0,
    "bigram_nats_per_color": 3.0,
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "training").mkdir()
    (tmp_path / "training/checkpoint.json").write_text('{"step": 7, "shards_digest": "ours"}')
    (tmp_path / "config.json").write_text('{"n_positions": 64}')
    return tmp_path


def write(model: Path, *results: dict[str, Any]) -> Path:
    (model / "results").mkdir(exist_ok=True)
    for result in results:
        (model / "results" / f"{result['task']}.json").write_text(json.dumps(PROVENANCE | result))
    return model


def test_baselines_resolution_and_n_are_beside_the_number(model: Path) -> None:
    (write(model, PROBE) / "results/linear_probe.png").write_bytes(b"\x89PNG")
    _, results, published = card_sections(model)
    for words in (
        "Images of 8x8 pixels. The numbers were measured on test; whether images of test are also in train was not "
        "counted.",
        "| Dataset | Measure | Chosen | This model | Raw pixels | Color histogram | Most common class | Better | n |",
        "| dots | Linear probe | layer 2 | 50.0 % (36.6–63.4) | 40.0 % | 60.0 % | 10.0 % | higher | 50 |",
        "- Linear probe, 50.0 % (36.6–63.4): at least as good is color histogram (60.0 %).",
        "![Linear probe: test accuracy 50.0%](results/linear_probe.png)",
    ):
        assert words in results, words
    assert "| dots | **this model: Linear probe** | 50.0 % (36.6–63.4) | measured |\n| dots | raw pixels |" in published
    assert "measured at 8x8" in published


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"digest": "ours", "images": {"test": 4000}, "images_in_train": {"test": 3}},
         "measured on test; 3 of the 4,000 images of test are also in train."),
        ({"digest": "ours", "images": {"test": 4000}, "images_in_train": {"test": 0}},
         "measured on test, whose images it was not trained on."),
        ({"digest": "other", "images": {"test": 4000}, "images_in_train": {"test": 0}}, "was not counted."),
        ({"digest": "ours", "images": {"test": 4000}}, "was not counted."),
        (None, "was not counted."),
    ],
)  # fmt: skip
def test_images_of_test_that_are_in_train_are_counted(model: Path, content: object, sentence: str) -> None:
    (write(model, PROBE) / "results/results.json").write_text(json.dumps({"dataset": content}))
    assert sentence in card_sections(model)[1]


def test_a_folder_of_results_that_cannot_be_read_is_named_with_the_reasons(model: Path) -> None:
    write(model, DENSITY | {"version": 9})
    with pytest.raises(
        ValueError, match=r"has no results; give .* wrote; density.json has version 9 of its format; .*"
    ):
        check_results(model / "results", model)


def test_results_of_initial_weights_that_cannot_be_read_are_named(model: Path) -> None:
    (write(model, PROBE) / "results/random_weights").mkdir()
    (model / "results/random_weights/density.json").write_text(json.dumps(PROVENANCE | DENSITY | {"version": 9}))
    assert "can't be read: random_weights/density.json has version 9" in card_sections(model)[1]


def test_a_bar_in_a_name_does_not_end_a_cell(model: Path) -> None:
    _, results, _ = card_sections(write(model, PROBE | {"dataset": "cats | dogs\n"}))
    assert r"| cats \| dogs | Linear probe |" in results


def test_numbers_of_train_are_named_as_such(model: Path) -> None:
    _, results, published = card_sections(write(model, DENSITY))
    assert "measured on train, the images that it was trained on" in results
    assert published == ""
    [nats] = eval_results(read_results(model / "results"))
    assert (nats.dataset_split, nats.metric_value) == ("train", 2.0)
    unlabelled = {"task": "distill", "split": "train", "test_images": 9, "student": {"test_accuracy": 0.5}}
    assert {result.dataset_split for result in eval_results({"d": PROVENANCE | unlabelled | {"title": "D"}})} == {
        "test"
    }


def test_results_that_cannot_be_read_are_named_and_excluded(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, results, _ = card_sections(write(model, PROBE, DENSITY | {"version": 2}, {"task": "completions"}))
    assert re.findall(r"Excluded, .*: (\w+\.json) has .*; (\w+\.json) has version 2 of its format", results) == [
        ("completions.json", "density.json")
    ]
    assert "density.json has version 2 of its format; this program reads up to 1; the card excludes it" in caplog.text
    assert "Nats per color" not in results and "| Linear probe |" in results


def test_nan_of_an_earlier_version_is_missing(model: Path) -> None:
    _, results, _ = card_sections(write(model, DENSITY | {"nats_per_color": float("nan")}))
    assert "| dots | Nats per color | train | – |" in results
    assert eval_results(read_results(model / "results")) == []
