import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import data_prep.build.plan
from data_prep.build.plan import plan_splits
from data_prep.config import DataConfig, SourceConfig
from data_prep.images.crops import area_resize
from data_prep.palette.codec import decode
from data_prep.shards.reader import Split, open_shard_set
from tests.launch import files_of

ROOT = Path(__file__).parents[3]


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of 4 images, shards of 8, so that a small set has many."""
    monkeypatch.setattr(data_prep.build.plan, "IMAGES_PER_RECORD", 4)
    monkeypatch.setattr(data_prep.build.plan, "IMAGES_PER_SHARD", 8)


def images_of(split: Split, palette: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    tokens, labels = split.gather(np.arange(split.images))
    return decode(tokens, palette, 8), labels


def test_the_set_contains_the_images(shards: Path, small: tuple[np.ndarray, np.ndarray]) -> None:
    """Each stored image is a source image, once, with its label, as close as 16 colors allow."""
    shard_set = open_shard_set(shards)
    sizes = {name: shard_set.split(name).images for name in shard_set.splits}
    assert sizes == {"train": 36, "valid": 12, "test": 12}
    assert (shard_set.resolution, shard_set.colors, shard_set.classes) == (8, 16, ["astronaut", "cat", "coffee"])
    reduced = np.stack([area_resize(image, 8) for image in small[0]]).astype(float)
    palette = 127.5 * (shard_set.palette.astype(float) + 1)
    nearest = ((reduced[:, :, :, None] - palette) ** 2).sum(-1).argmin(-1)
    wanted = sorted((label, *tokens.ravel().tolist()) for tokens, label in zip(nearest, small[1].tolist(), strict=True))
    found = []
    for name in sizes:
        tokens, labels = shard_set.split(name).gather(np.arange(sizes[name]))
        found += [(label, *row) for row, label in zip(tokens.tolist(), labels.tolist(), strict=True)]
    assert sorted(found) == wanted


def test_palette_error_in_the_manifest_is_correct(shards: Path, small: tuple[np.ndarray, np.ndarray]) -> None:
    shard_set = open_shard_set(shards)
    reduced = np.stack([area_resize(image, 8) for image in small[0][::5]]).astype(float)
    colors = np.rint(127.5 * (shard_set.palette.astype(float) + 1))
    error = ((reduced[:, :, :, None] - colors) ** 2).mean(-1).min(-1).mean()
    assert shard_set.manifest["splits"]["test"]["palette_mean_squared_error"] == pytest.approx(error, rel=1e-3)


@pytest.mark.usefixtures("small_shards")
def test_bytes_do_not_depend_on_the_workers(tmp_path: Path, options: list[str], run: Callable[..., Any]) -> None:
    for name, workers in (("one", 1), ("again", 1), ("three", 3)):
        assert run("shards", *options, "--workers", workers, "--out", tmp_path / name).code == 0
    one = files_of(tmp_path / "one")
    assert len(one) > 8
    assert files_of(tmp_path / "again") == one
    assert files_of(tmp_path / "three") == one


def test_another_seed_gives_another_order(
    tmp_path: Path, shards: Path, options: list[str], run: Callable[..., Any]
) -> None:
    assert run("shards", *options, "--seed", 1, "--out", tmp_path / "other").code == 0
    labels = [open_shard_set(folder).split("train").record(0)[1].tolist() for folder in (shards, tmp_path / "other")]
    assert labels[0] != labels[1]


def test_an_interrupted_run_resumes(
    tmp_path: Path, options: list[str], run: Callable[..., Any], small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Complete shards are reused; missing, damaged and partially written ones are prepared again."""
    import data_prep.build.build as prepare

    assert run("shards", *options, "--out", tmp_path / "unbroken").code == 0
    out, written = tmp_path / "broken", []
    writer = prepare.open_shard

    def write_some(path: Path) -> Any:
        written.append(path.name)
        if len(written) == 4:
            raise OSError(28, "No space left on device", str(path))
        return writer(path)

    monkeypatch.setattr(prepare, "open_shard", write_some)
    failed = run("shards", *options, "--out", out)
    assert failed.code == 2
    assert failed.err.splitlines()[-1] == f"error: {out / written[3]}: No space left on device."
    assert not (out / "shards.json").exists()
    kept, damaged = out / written[0], out / written[1]
    kept_since = kept.stat().st_mtime_ns
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    (out / ".train-000009.tar.99.partial").write_text("half")
    written.clear()
    monkeypatch.setattr(prepare, "open_shard", writer)

    assert run("shards", *options, "--out", out).code == 0
    assert kept.stat().st_mtime_ns == kept_since
    assert files_of(out) == files_of(tmp_path / "unbroken")


def test_kills_do_not_change_the_result(tmp_path: Path) -> None:
    """SIGKILL to the entire process group at several moments, then an uninterrupted run."""

    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "data_prep", "shards", "--source.kind", "photographs", "--workers", "2"]
        command += ["--resolution", "8", "--palette.colors", "16", "--out", str(out)]
        return subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)

    assert start(tmp_path / "unbroken").wait() == 0
    out = tmp_path / "killed"
    for seconds in (0.9, 1.6, 2.2):
        process = start(out)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert start(out).wait() == 0
    assert files_of(out) == files_of(tmp_path / "unbroken")


def test_a_finished_set_is_not_written_again(shards: Path, options: list[str], run: Callable[..., Any]) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in shards.iterdir()}
    again = run("shards", *options, "--out", shards)
    assert again.code == 0
    assert "is finished" in again.err
    assert {file.name: file.stat().st_mtime_ns for file in shards.iterdir()} == before
    assert "unfinished" not in before


def test_a_finished_set_whose_source_changed_is_an_error(tmp_path: Path, run: Callable[..., Any]) -> None:
    for number in range(20):
        image = tmp_path / f"pictures/train/{number % 2}/{number}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(image)
    options = ["--source.kind", "image_folder", "--source.path", tmp_path / "pictures", "--resolution", 8]
    options += ["--palette.colors", 8, "--out", tmp_path / "out"]
    assert run("shards", *options).code == 0
    image.unlink()
    refused = run("shards", *options)
    assert refused.code == 2
    assert "the source's images have changed since" in refused.err
    shutil.rmtree(tmp_path / "pictures")
    assert "its source is no longer available" in run("shards", *options).err


def test_a_palette_fitted_separately_is_the_same(
    tmp_path: Path, shards: Path, options: list[str], run: Callable[..., Any]
) -> None:
    assert run("palette", *options, "--out", tmp_path / "palette.npy").code == 0
    again = run("palette", *options, "--out", tmp_path / "palette.npy")
    assert again.code == 2
    assert "which already exists and is not overwritten" in again.err
    assert (tmp_path / "palette.npy").read_bytes() == (shards / "palette.npy").read_bytes()
    given = [*options, "--palette.file", tmp_path / "palette.npy", "--out", tmp_path / "given"]
    assert run("shards", *given).code == 0
    assert run("shards", *given).err.count("is finished") == 1
    assert open_shard_set(tmp_path / "given").split("train").record(0)[0].tolist() == (
        open_shard_set(shards).split("train").record(0)[0].tolist()
    )


def config(**changes: Any) -> DataConfig:
    return DataConfig(source=SourceConfig(kind="photographs"), **changes)


def test_validation_images_are_held_out_of_training() -> None:
    plans = plan_splits({"train": 1000, "test": 10}, config(valid_fraction=0.04))
    train, valid = plans["train"].source_indices, plans["valid"].source_indices
    assert (len(train), len(valid)) == (960, 40)
    assert sorted([*train, *valid]) == list(range(1000))
    assert plans["valid"].source_split == "train"
    assert (plans["valid"].views == -1).all()
    again = plan_splits({"train": 1000, "test": 10}, config(valid_fraction=0.04))
    assert (again["valid"].source_indices == valid).all()
    other = plan_splits({"train": 1000}, config(valid_fraction=0.04, seed=1))
    assert (other["valid"].source_indices != valid).any()


def test_the_sources_own_validation_split_is_used() -> None:
    plans = plan_splits({"train": 100, "valid": 20}, config())
    assert sorted(plans["train"].source_indices) == list(range(100))
    assert plans["valid"].source_split == "valid"
    assert sorted(plans["valid"].source_indices) == list(range(20))


def test_every_view_of_every_training_image_is_stored_once() -> None:
    from data_prep.config import ViewsConfig

    plan = plan_splits({"train": 50}, config(valid_fraction=0.0, views=ViewsConfig(train=3)))["train"]
    assert sorted(zip(plan.source_indices, plan.views, strict=True)) == [(p, v) for p in range(50) for v in range(3)]


def test_records_mix_the_classes(tmp_path: Path, run: Callable[..., Any]) -> None:
    options = ["--source.kind", "photographs", "--source.train_per_class", 60, "--source.test_per_class", 30]
    assert run("shards", *options, "--resolution", 4, "--palette.colors", 8, "--out", tmp_path / "set").code == 0
    shard_set = open_shard_set(tmp_path / "set")
    for name in shard_set.splits:
        labels = shard_set.split(name).record(0)[1]
        counts = np.bincount(labels[:50], minlength=10)
        assert counts.min() >= 1
        assert counts.max() <= 14


def test_the_manifest_records_configuration_and_versions(shards: Path, folder: Path) -> None:
    manifest = json.loads((shards / "shards.json").read_text())
    assert manifest["config"]["source"]["path"] == str(folder)
    assert manifest["config"]["seed"] == 0
    assert "workers" not in manifest["config"]
    assert DataConfig.from_dict(manifest["config"]).valid_fraction == 0.25


def test_progress_is_lines_in_a_log(tmp_path: Path, options: list[str], run: Callable[..., Any]) -> None:
    result = run("shards", *options, "--out", tmp_path / "shards")
    assert "shards: 60 of 60 images" in result.err
    assert "\r" not in result.err
    assert "60 source images" in result.err


def test_help_is_quick() -> None:
    """By CPU time, independent of other processes on the machine."""
    before = os.times()
    subprocess.run([sys.executable, "-m", "data_prep", "--help"], cwd=ROOT, check=True, capture_output=True)
    after = os.times()
    assert sum(after[2:4]) - sum(before[2:4]) < 1
