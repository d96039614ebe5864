"""Accuracy against validation loss over checkpoints: what is drawn, where the loss is from, what can't be compared."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.evaluate.command import evaluate
from pipeline.results.report.compare import compare_command

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def measured(shards_folder: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """results.json of a model, as `evaluate` writes it."""
    out = tmp_path_factory.mktemp("measured")
    quick = ["--tasks", "density,linear_probe", "--density.split", "valid", "--linear_probe.l2", "[0.1]"]
    assert evaluate([str(model_folder), "--shards", str(shards_folder), "--out", str(out), *quick]) == 0
    return json.loads((out / "results.json").read_text())


@pytest.fixture
def checkpoint(measured: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """Writes the results of a checkpoint, with changes, into MODEL/step-N."""

    def write(model: str, step: int, loss: float, change: Change = lambda _results: None) -> Path:
        results = json.loads(json.dumps(measured))
        results["model"] |= {"checkpoint_step": step, "images_seen": 16 * step, "valid_loss": loss + 0.5}
        results["tasks"]["density"]["nats_per_color"] = loss
        probe = results["tasks"]["linear_probe"]
        probe["valid_accuracy_by_layer"][probe["best_layer"]] = 1 / loss
        change(results)
        folder = tmp_path / model / f"step-{step:08}"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(results))
        return folder.parent

    return write


def compare(*arguments: object) -> dict[str, Any]:
    out = Path(str(arguments[0])).parent / "compared"
    assert compare_command([*map(str, arguments), "--out", str(out)]) == 0
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((out / "compare.json").read_text())


def losses(comparison: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    return {
        model["name"]: [(point["step"], point["valid_loss"]) for point in model["points"]]
        for model in comparison["models"]
    }


def test_one_line_per_model_and_one_point_per_checkpoint(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    for step, loss in ((100, 2.0), (9, 3.0), (1000, 1.5)):
        small = checkpoint("small", step, loss)
    large = checkpoint("large", 100, 1.25)
    comparison = compare(small, large)
    assert losses(comparison) == {"small": [(9, 3.0), (100, 2.0), (1000, 1.5)], "large": [(100, 1.25)]}
    assert comparison["loss"] == "density"
    assert [point["valid_accuracy"] for point in comparison["models"][0]["points"]] == [1 / 3, 0.5, 1 / 1.5]
    page = (tmp_path / "compared/compare.html").read_text()
    for shown in ("<td>small</td>", "<td>large</td>", "1,000", "1.2500", "66.7 %", "data:image/png;base64,iVBOR"):
        assert shown in page


def test_the_logged_loss_if_density_was_not_measured_on_valid(checkpoint: Callable[..., Path]) -> None:
    """One checkpoint without it is enough: losses of two kinds do not share an axis."""

    def on_test(results: dict[str, Any]) -> None:
        results["tasks"]["density"]["split"] = "test"

    checkpoint("model", 1, 3.0)
    comparison = compare(checkpoint("model", 2, 2.0, on_test))
    assert comparison["loss"] == "run"
    assert losses(comparison) == {"model": [(1, 3.5), (2, 2.5)]}


def test_the_test_split_on_demand(checkpoint: Callable[..., Path], measured: dict[str, Any]) -> None:
    folder = checkpoint("model", 1, 3.0)
    assert compare(folder, "--accuracy", "test")["accuracy"] == "test"
    assert "test accuracy" in (folder.parent / "compared/compare.html").read_text()


def test_a_checkpoint_without_results_is_excluded(
    checkpoint: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint("model", 1, 3.0)
    folder = checkpoint("model", 2, 2.0, lambda results: results["tasks"].pop("linear_probe"))
    assert losses(compare(folder)) == {"model": [(1, 3.0)]}
    assert "step-00000002 has no results of linear_probe yet; it is excluded" in caplog.text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda results: results.update(version=3), "has results of a later version (3; this program reads up to 2)"),
        (lambda results: results["dataset"].update(digest=7), "has results of another version (the digest of its"),
        (lambda results: results["model"].pop("parameters"), "has results of another version (KeyError('parameters'))"),
        (lambda results: results["tasks"]["density"].pop("options"), "has results of another version (KeyError("),
        (lambda results: results.pop("tasks"), "has results of another version (KeyError('tasks'))"),
    ],
)
def test_results_of_other_versions_are_excluded_and_named(
    change: Change, reason: str, checkpoint: Callable[..., Path], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    checkpoint("model", 1, 3.0)
    folder = checkpoint("model", 2, 2.0, change)
    comparison = compare(folder)
    assert losses(comparison) == {"model": [(1, 3.0)]}
    assert (comparison["format"], comparison["version"]) == ("image-gpt-comparison", 1)
    assert f"step-00000002 {reason}" in caplog.text
    page = (tmp_path / "compared/compare.html").read_text()
    assert "Excluded: model/step-00000002 has results of" in page
    assert "Measured on 110 validation images and 127 test images." in page
    (folder / "step-00000002/results.json").write_text("{")
    assert losses(compare(folder)) == {"model": [(1, 3.0)]}
    assert "step-00000002 has a damaged results.json (is not readable as JSON (" in caplog.text
    only = checkpoint("other", 1, 3.0, change)
    with pytest.raises(ValueError, match="other has no checkpoint with results of linear_probe that can be read"):
        compare(only)


def test_results_of_one_model_are_a_point(checkpoint: Callable[..., Path]) -> None:
    folders = [checkpoint(model, 7, loss) / "step-00000007" for model, loss in (("one", 3.0), ("two", 2.0))]
    assert list(losses(compare(*folders))) == [str(folder) for folder in folders]  # their own names are alike


def set_in(*keys: str, value: object) -> Change:
    def change(results: dict[str, Any]) -> None:
        for key in keys[:-1]:
            results = results[key]
        results[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_in("dataset", "digest", value="f" * 64), "was measured on shard set ffffffffffff, but .* on"),
        (set_in("tasks", "linear_probe", "options", "train_images", value=9), "linear_probe with train_images 9, but"),
        (set_in("tasks", "density", "masked", value=True), "measured density with masked True, but"),
        (set_in("format", value="mine"), r"results\.json was not written by `python -m pipeline evaluate`"),
    ],
)
def test_results_that_are_not_comparable(change: Change, message: str, checkpoint: Callable[..., Path]) -> None:
    checkpoint("model", 1, 3.0)
    folder = checkpoint("model", 2, 2.0, change)
    with pytest.raises(ValueError, match=message):
        compare(folder)
    assert not (folder.parent / "compared").exists()


def test_larger_batches_compare(checkpoint: Callable[..., Path]) -> None:
    checkpoint("model", 1, 3.0)
    compare(checkpoint("model", 2, 2.0, set_in("tasks", "linear_probe", "options", "batch_size", value=1)))


def test_missing_losses_and_folders(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    def without(results: dict[str, Any]) -> None:
        del results["tasks"]["density"]
        results["model"]["valid_loss"] = None

    folder = checkpoint("model", 1, 3.0, without)
    with pytest.raises(ValueError, match=r"step-00000001 has no validation loss: .* --tasks density --density\.split"):
        compare(folder)
    with pytest.raises(ValueError, match=r"nothing has no results\.json and no step-"):
        compare(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"has no checkpoint with results of knn.*; evaluate with --tasks knn"):
        compare(folder, "--task", "knn")
    checkpoint("other", 1, 3.0)
    with pytest.raises(ValueError, match="is given twice"):
        compare(tmp_path / "other", tmp_path / "other")
    with pytest.raises(ValueError, match="density, whose results have no valid accuracy"):
        compare(tmp_path / "other", "--task", "density")
