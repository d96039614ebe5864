"""`python -m pipeline evaluate`: results, what is run again, invalid input, ranks."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import rmtree

import numpy as np
import pytest
import torch

from data_prep.common.exit_codes import Failed
from data_prep.shards.reader import open_shard_set
from pipeline.evaluate.command import evaluate
from pipeline.evaluate.registry import TASKS
from pipeline.evaluate.request import Command
from pipeline.weights.model_files import model_digest
from tests import launch
from tests.pipeline.evaluate.tiny_sets import COLORS, random_images, random_palette, write_model, write_shard_set

QUICK = [
    "--linear_probe.l2", "[0.1, 0.01]", "--low_data.l2", "[0.1, 0.01]", "--low_data.subsets", "2",
    "--low_data.per_class", "[4]", "--low_data.layer", "1", "--completions.images", "3", "--completions.samples", "2",
    "--attentive_probe.epochs", "1", "--attentive_probe.layers", "[1]", "--fine_tune.epochs", "1",
    "--fine_tune.learning_rates", "[0.001]", "--distill.epochs", "1", "--distill.learning_rates", "[0.001]",
]  # fmt: skip
TWO_RANKS = Path(__file__).with_name("two_ranks.py")


@pytest.fixture
def quick(toy_network: Path) -> list[str]:
    """Options that make every task quick."""
    return [*QUICK, "--completions.feature_network", str(toy_network)]


@pytest.fixture
def run(shards_folder: Path, model_folder: Path, tmp_path: Path, quick: list[str]) -> Callable[..., Path]:
    """Runs the command with defaults that later arguments override; returns the folder of results."""

    def command(*arguments: str, model: Path = model_folder) -> Path:
        out = tmp_path / "results"
        assert evaluate([str(model), "--shards", str(shards_folder), "--out", str(out), *quick, *arguments]) == 0
        return out

    return command


def results_of(folder: Path) -> dict[str, dict]:
    """What each task left."""
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json") if path.stem in TASKS}


def test_every_task_writes_its_result_and_provenance(
    run: Callable[..., Path], shards_folder: Path, model_folder: Path
) -> None:
    folder = run("--seed", "3", "--tasks", ",".join(TASKS))
    shown = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    figures = {f"{task}.png" for task in TASKS}
    assert shown == {f"{task}.json" for task in TASKS} | figures | {
        "report.html", "results.json", "fine_tuned", "distilled",
    }  # fmt: skip
    for task, result in results_of(folder).items():
        assert result["task"] == task
        assert result["seed"] == 3
        assert result["dataset_digest"] == open_shard_set(shards_folder).digest
        assert result["checkpoint_step"] is None  # the folder does not record it
        assert result["command"].startswith(f"python -m pipeline evaluate {model_folder}")
    probe, density = results_of(folder)["linear_probe"], results_of(folder)["density"]
    assert len(probe["valid_accuracy_by_layer"]) == 4
    assert all(0 <= probe[key] <= 1 for key in ("test_accuracy", "raw_pixel_test_accuracy"))
    assert density["bits_per_color"] > density["nats_per_color"] > 0


def test_a_result_is_reused_until_an_input_changes(
    run: Callable[..., Path], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    density = run("--tasks", "density") / "density.json"
    first = density.stat().st_mtime_ns

    run("--tasks", "density")
    assert density.stat().st_mtime_ns == first
    assert "already measured" in caplog.text
    changes = (["--test_images", "60"], ["--seed", "1"], ["--density.split", "valid"])
    for change in (["--overwrite"], ["--again"], *changes):
        run("--tasks", "density")
        before = density.stat().st_mtime_ns
        run("--tasks", "density", *change)
        assert density.stat().st_mtime_ns != before, change
    run("--tasks", "density")
    before = density.stat().st_mtime_ns
    run("--tasks", "density", model=write_model(tmp_path / "other", "gpt2"))
    assert density.stat().st_mtime_ns != before


def test_results_of_an_earlier_version_are_shown_and_unchanged(
    run: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Results of tasks that the command reuses, and of others in the folder and in random_weights."""
    folder = run("--tasks", "density,knn")
    run("--tasks", "density", "--weights", "random", "--out", str(folder / "random_weights"))
    run("--tasks", "density")
    page = (folder / "report.html").read_text()
    paths = [folder / "density.json", folder / "knn.json", folder / "random_weights" / "density.json"]
    without_what_is_shown(paths)
    written = [path.read_bytes() for path in paths]
    caplog.clear()
    run("--tasks", "density")
    assert "already measured" in caplog.text
    assert (folder / "report.html").read_text() == page
    assert [path.read_bytes() for path in paths] == written


def without_what_is_shown(paths: list[Path]) -> None:
    """Tasks' JSON as an earlier version wrote it."""
    for path in paths:
        result = json.loads(path.read_text())
        assert [result.pop(key) for key in ("title", "summary")] and result.pop("headlines")
        path.write_text(json.dumps(result))


def test_a_command_that_ends_early_leaves_a_report_of_the_tasks_that_ended(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run("--tasks", "completions")

    def cut_off(*_: object) -> dict:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.evaluate.tasks.knn.KNN.measure", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run("--tasks", "density,knn,linear_probe,completions")
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert (set(results["tasks"]), results["not_run"]) == ({"density", "completions"}, ["knn", "linear_probe"])
    page = (tmp_path / "results" / "report.html").read_text()
    assert "<h2>Density</h2>" in page
    assert "Not run yet: k-NN, Linear probe." in page
    monkeypatch.undo()
    folder = run("--tasks", "density,knn,linear_probe,completions")
    assert json.loads((folder / "results.json").read_text())["not_run"] == []
    assert "not run yet" not in (folder / "report.html").read_text()


def test_no_task_that_fits_is_no_error(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pipeline.evaluate.run._fitting_jobs", lambda *_: [])
    assert not (run("--tasks", "density") / "report.html").exists()
    assert "no task to run" in caplog.text


def test_a_task_that_runs_out_of_memory_ends_in_one_sentence(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: object) -> dict:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr("pipeline.evaluate.tasks.knn.KNN.measure", too_large)
    message = (
        "out of memory in knn (2.00 GiB could not be allocated): each rank computes 16 images at once; "
        "set --batch_size lower, or --train_images if its features do not fit."
    )
    with pytest.raises(Failed, match=f"^{re.escape(message)}$"):
        run("--tasks", "knn", "--batch_size", "16")


def test_a_classifier_whose_folder_was_deleted_is_trained_again_by_overwrite(
    run: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = run("--tasks", "fine_tune") / "fine_tuned"
    caplog.clear()
    run("--tasks", "fine_tune")
    assert "skipped (--overwrite runs it again)" in caplog.text
    rmtree(folder)
    run("--tasks", "fine_tune")
    assert f"but its folder {folder} no longer exists: --overwrite trains the classifier again" in caplog.text
    for tasks in ("distill", "fine_tune,distill"):
        with pytest.raises(ValueError, match="run the task fine_tune with --overwrite on the same results first"):
            run("--tasks", tasks)
    run("--tasks", "fine_tune", "--overwrite")
    assert folder.is_dir()


def test_a_copy_of_the_model_counts_as_the_same(
    run: Callable[..., Path], model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run("--tasks", "density")
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in model_folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    run("--tasks", "density", model=copy)
    assert "already measured" in caplog.text


def test_one_image_has_no_error(run: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    folder = run("--tasks", "linear_probe,density", "--test_images", "1")
    results, page = results_of(folder), (folder / "report.html").read_text()
    page = re.sub(r"base64,[^\"]+", "", page).partition("<h2>Published numbers")[0]
    probe = results["linear_probe"]
    assert [probe[f"test_{name}"] for name in ("accuracy_interval", "standard_error")] == [None, None]
    assert results["density"]["nats_standard_error"] is None
    assert f"test accuracy {probe['test_accuracy']:.1%} of 1 image " in caplog.text
    assert "±" not in page
    assert "Wilson" not in page
    assert "Mean over 1 image of test." in page


def test_options_come_from_a_file_too(run: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "evaluate.yaml").write_text(
        "tasks: density\ntest_images: 20\ndensity: {split: valid}\nvalid_images: 30\n"
    )
    result = results_of(run("--config", str(tmp_path / "evaluate.yaml")))["density"]
    assert (result["split"], result["images"]) == ("valid", 30)


def test_initial_weights_are_another_model(
    run: Callable[..., Path], model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The zero head of the paper's initial weights makes every color as likely."""
    trained = results_of(run("--tasks", "density"))["density"]
    replaced = "density.json has results of another model or shard set, which these will replace"
    assert replaced not in caplog.text
    random = results_of(run("--tasks", "density", "--weights", "random"))["density"]
    assert replaced in caplog.text
    assert (trained["weights"], random["weights"]) == ("trained", "random")
    assert random["nats_per_color"] == pytest.approx(math.log(COLORS), abs=1e-6)
    assert random["model_digest"] != trained["model_digest"] == model_digest(model_folder)


def test_a_masked_model_skips_tasks_that_do_not_support_it(
    run: Callable[..., Path], masked_folder: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="completions need a model of the next color"):
        run("--tasks", "density,completions", model=masked_folder)
    assert not list((tmp_path / "results").glob("*.json"))  # reported before anything was measured
    assert set(results_of(run(model=masked_folder))) == set(Command.tasks.split(",")) - {"completions"}
    assert "completions: skipped; completions need a model of the next color" in caplog.text


def test_a_set_without_labels_skips_probes(
    run: Callable[..., Path], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    splits = {name: random_images(60, 0, unlabelled=60) for name in ("train", "valid", "test")}
    bare = write_shard_set(tmp_path / "bare", splits, random_palette())
    with pytest.raises(ValueError, match="has no labelled images in its split train"):
        run("--shards", str(bare), "--tasks", "density,knn")
    assert set(results_of(run("--shards", str(bare)))) == {"density", "completions"}
    assert f"knn: skipped; {bare} has no labelled images" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "density,magic"], "--tasks has 'magic'; the tasks are linear_probe, .*, completions"),
        (["--shards", "nowhere"], "nowhere does not exist"),
        (["--batch_size", "0"], "batch_size is 0; it must be at least 1"),
        (["--precision", "fp8"], "precision"),
        (["--linear_probe.l2", "[]"], r"linear_probe\.l2"),
        (["--seeds", "1"], "seeds is not a known key"),
        (["--density.draws", "0"], r"density\.draws is 0; it must be at least 1"),
        (["--completions.distance_images", "1"], "distance_images is 1; it must be 0, or at least 2"),
        (["--completions.feature_network", "none.pt"], r"feature_network is none\.pt, which does not exist"),
        (["--out", __file__], "which is a file; it must be a folder"),
    ],
)
def test_invalid_input_is_one_sentence(
    arguments: list[str], message: str, run: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        run(*arguments)
    assert "\n" not in " ".join(str(caught.value).splitlines())
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--tasks", "density,attentive_probe", "--attentive_probe.heads", "3"],
            r"attentive_probe\.heads is 3; it must",
        ),
        (
            ["--tasks", "density,attentive_probe", "--attentive_probe.layers", "[9]"],
            r"attentive_probe\.layers has 9; the",
        ),
        (
            ["--tasks", "density,low_data", "--low_data.layer", "4"],
            r"low_data\.layer is 4; it must be 0 to",
        ),
        (["--tasks", "density,low_data", "--low_data.per_class", "[500]"], "low_data is set to use 500 per class, but"),
        (
            ["--tasks", "density,fine_tune", "--fine_tune.reflect_crop", "6"],
            r"fine_tune\.reflect_crop is 6; for images of",
        ),
        (
            ["--tasks", "density,knn", "--knn.k", "[999]"],
            r"knn\.k is \[999\], but .* has 323 labelled images in train",
        ),
        (
            ["--tasks", "density,completions", "--completions.split", "dev"],
            "has no split 'dev'; it has train, valid, test",
        ),
        (["--tasks", "density,completions", "--completions.images", "999"], "images is 999, but"),
        (
            ["--tasks", "density,distill"],
            "distill needs a teacher, but .*fine_tuned has no classifier; run the task",
        ),
        (["--tasks", "density,distill,fine_tune"], "distill needs a teacher"),
        (["--tasks", "density,fine_tune,distill", "--distill.split", "dev"], "has no split 'dev'"),
        (["--tasks", "density,fine_tune,distill", "--distill.heads", "3"], r"distill\.heads is 3; it must divide"),
        (["--tasks", "density,fine_tune,distill", "--distill.student", "none"], "none is not a model; give"),
    ],
)
def test_every_task_is_checked_before_the_first_starts(
    arguments: list[str], message: str, run: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run(*arguments)
    assert not list((tmp_path / "results").glob("*.json"))


def test_a_network_that_takes_other_images_is_an_error_before_the_first_task(
    run: Callable[..., Path], tmp_path: Path
) -> None:
    torch.jit.script(torch.nn.Conv2d(3, 4, 3)).save(tmp_path / "floats.pt")
    with pytest.raises(ValueError, match=r"floats\.pt, which does not accept images of 6x6 as uint8"):
        run("--tasks", "density,completions", "--completions.feature_network", str(tmp_path / "floats.pt"))
    assert not list((tmp_path / "results").glob("*.json"))


def test_another_palette_or_resolution_is_an_error_before_any_work(run: Callable[..., Path], tmp_path: Path) -> None:
    splits = {name: random_images(20, 0) for name in ("train", "valid", "test")}
    palette = random_palette(seed=1)
    repainted = write_shard_set(tmp_path / "repainted", splits, palette)
    with pytest.raises(ValueError, match=r"has palette \w{12}, but .*repainted has palette \w{12}"):
        run("--shards", str(repainted))
    small = {name: (tokens[:, :16], labels) for name, (tokens, labels) in splits.items()}
    shrunk = write_shard_set(tmp_path / "shrunk", small, random_palette(), resolution=4)
    with pytest.raises(ValueError, match=r"model of 6x6 pixels, but .*shrunk has 4x4"):
        run("--shards", str(shrunk))
    assert not (tmp_path / "results").exists()


def test_a_model_without_palette_is_an_error(run: Callable[..., Path], model_folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in model_folder.iterdir():
        if file.name != "preprocessor_config.json":
            (bare / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="has no palette in preprocessor_config"):
        run(model=bare)


def test_two_ranks_measure_what_one_measures(
    run: Callable[..., Path],
    quick: list[str],
    shards_folder: Path,
    model_folder: Path,
    one_thread: dict[str, str],
    tmp_path: Path,
) -> None:
    """Real processes under torchrun, gloo between them: the same features, losses and accuracies, to the last bit."""
    options = ["--batch_size", "20", "--train_images", "150"]
    one = results_of(run(*options))
    folders = [tmp_path / "results", tmp_path / "two"]
    command = [str(model_folder), "--shards", str(shards_folder), "--out", str(folders[1]), *quick, *options]
    files = [tmp_path / f"features-{ranks}.npy" for ranks in (1, 2)]
    alone = launch.run(1, TWO_RANKS, files[0], *command, logs=tmp_path / "logs")
    assert alone.codes == [0], alone.output
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [sys.executable, *launcher, str(TWO_RANKS), str(files[1]), *command]
    process = subprocess.run(words, env=one_thread, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "2 ranks on cpu" in process.stderr
    np.testing.assert_array_equal(*map(np.load, files))
    two = results_of(folders[1])
    assert sorted(two) == sorted(one)
    for task, result in one.items():
        for key in set(result) - {"command", "seconds"}:
            assert two[task][key] == result[key], (task, key)
    images = [re.findall(r"base64,([^\"]+)", (folder / "report.html").read_text()) for folder in folders]
    assert images[0] == images[1]
