"""Parts, kills and restarts change no byte of the result; skipped images are counted and listed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import data_prep.build.encode_stream
import data_prep.build.plan
from data_prep.shards.reader import open_shard_set
from tests.data_prep.tar_files import encode_image, tar_bytes
from tests.launch import files_of

ROOT = Path(__file__).parents[3]
Small = tuple[np.ndarray, np.ndarray]
Run = Callable[..., Any]


@pytest.fixture
def tars(tmp_path: Path, small: Small) -> Path:
    """Eight tars of 15 images with labels; the tenth of each is truncated."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for number in range(8):
        members = []
        for place in range(15):
            index = (number * 15 + place) % 60
            content = encode_image(small[0][index])[: 90 if place == 9 else None]
            members += [(f"{number}_{place:03d}.png", content), (f"{number}_{place:03d}.cls", b"%d" % small[1][index])]
        (folder / f"{number:05d}.tar").write_bytes(tar_bytes(members))
    return folder


@pytest.fixture(params=["stream", "folder"])
def source(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A source of streams, and a source with random access, both with many units."""
    for module in (data_prep.build.plan, data_prep.build.encode_stream):
        monkeypatch.setattr(module, "IMAGES_PER_RECORD", 4)
    monkeypatch.setattr(data_prep.build.plan, "IMAGES_PER_SHARD", 8)
    monkeypatch.setattr(data_prep.build.encode_stream, "BLOCK_IMAGES", 8)
    options = ["--resolution", "8", "--palette.colors", "16", "--valid_fraction", "0.2", "--max_skipped", "0.1"]
    if request.param == "folder":
        return [*options, "--source.kind", "image_folder", "--source.path", str(request.getfixturevalue("folder"))]
    return [*options, "--source.kind", "webdataset", "--source.path", str(request.getfixturevalue("tars"))]


@pytest.fixture
def palette(tmp_path: Path, source: list[str], run: Run) -> Path:
    assert run("palette", *source, "--out", tmp_path / "palette.npy").code == 0
    return tmp_path / "palette.npy"


def test_parts_give_the_same_bytes(tmp_path: Path, source: list[str], palette: Path, run: Run) -> None:
    options = [*source, "--palette.file", palette]
    assert run("shards", *options, "--out", tmp_path / "whole").code == 0
    whole = files_of(tmp_path / "whole")
    assert len([name for name in whole if name.startswith("train")]) >= 5
    assert run("shards", *options, "--out", tmp_path / "one", "--part", 1, "--parts", 1).code == 0
    assert files_of(tmp_path / "one") == whole  # a part that is all of them leaves nothing to join
    for parts in (3, 7):
        out = tmp_path / f"{parts} parts"
        for part in reversed(range(1, parts + 1)):
            refused = run("join", out)
            assert refused.code == 2
            assert "first" in refused.err or "has no parts" in refused.err
            assert run("shards", *options, "--out", out, "--part", part, "--parts", parts).code == 0
            assert not (out / "shards.json").exists()
        joined = run("join", out)
        assert joined.code == 0, joined.err
        assert files_of(out) == whole
        open_shard_set(out).verify()
        again = run("join", out)
        assert again.code == 0
        assert "already joined" in again.err


def test_missing_work_items_are_reported_with_their_parts(
    tmp_path: Path, source: list[str], palette: Path, run: Run
) -> None:
    out = tmp_path / "out"
    assert run("shards", *source, "--palette.file", palette, "--out", out, "--part", 1, "--parts", 2).code == 0
    (out / "unfinished/part-00002-of-00002.json").write_text("{}\n")  # as a part leaves that was killed
    refused = run("join", out)
    assert refused.code == 2
    assert "run part 2 of 2, then join again" in refused.err
    assert "Traceback" not in refused.err


def test_a_palette_changed_between_part_and_join_is_an_error(
    tmp_path: Path, source: list[str], palette: Path, run: Run
) -> None:
    out = tmp_path / "out"
    for part in (1, 2):
        assert run("shards", *source, "--palette.file", palette, "--out", out, "--part", part, "--parts", 2).code == 0
    np.save(out / "palette.npy", np.load(palette)[::-1])
    refused = run("join", out)
    assert refused.code == 2
    assert "palette.npy has sha256" in refused.err and "restore that palette" in refused.err
    assert not (out / "shards.json").exists()


def test_a_shard_lost_between_part_and_join_is_an_error(
    tmp_path: Path, source: list[str], palette: Path, run: Run
) -> None:
    out = tmp_path / "out"
    for part in (1, 2):
        assert run("shards", *source, "--palette.file", palette, "--out", out, "--part", part, "--parts", 2).code == 0
    victim = sorted(out.glob("train-*.tar"))[2]
    victim.write_bytes(victim.read_bytes()[:-512])
    assert f"{victim} is missing or has changed since it was written" in run("join", out, "--max_skipped", 0.1).err


def test_a_part_needs_a_palette_and_a_number(tmp_path: Path, source: list[str], run: Run) -> None:
    without = run("shards", *source, "--out", tmp_path / "out", "--part", 1, "--parts", 2)
    assert without.code == 2
    assert "palette.file is not set" in without.err
    for part in (0, 3):
        wrong = run("palette", *source, "--out", tmp_path / "p.npy", "--part", part, "--parts", 2)
        assert wrong.code == 2
        assert f"--part is {part}; it must be between 1 and --parts" in wrong.err


def test_a_part_with_other_options_is_an_error(tmp_path: Path, source: list[str], palette: Path, run: Run) -> None:
    options = [*source, "--palette.file", palette, "--out", tmp_path / "out"]
    assert run("shards", *options, "--part", 1, "--parts", 2).code == 0
    assert "seed 0, but it is now 1" in run("shards", *options, "--seed", 1, "--part", 2, "--parts", 2).err


def test_palettes_counted_in_parts_add_up(tmp_path: Path, source: list[str], palette: Path, run: Run) -> None:
    for parts in (1, 2, 5):
        out = tmp_path / f"{parts}.npy"
        for part in range(parts, 0, -1):
            if parts > 1 and part < parts:
                assert f"is missing part {', '.join(map(str, range(1, part + 1)))} of {parts}" in run("join", out).err
            assert run("palette", *source, "--out", out, "--part", part, "--parts", parts).code == 0
        if parts > 1:
            assert run("join", out).code == 0
        assert out.read_bytes() == palette.read_bytes()
        assert not out.with_name(f"{out.name}.parts").exists()


def test_a_stream_stores_every_image_once(
    tmp_path: Path, tars: Path, small: Small, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """112 of 120 images, each in train or valid; the 8 truncated ones are listed."""
    monkeypatch.setattr(data_prep.build.encode_stream, "BLOCK_IMAGES", 8)
    options = ["--source.kind", "webdataset", "--source.path", tars, "--resolution", 32, "--palette.colors", 512]
    result = run("shards", *options, "--valid_fraction", 0.3, "--max_skipped", 0.1, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert "120 source images, 8 skipped; 112 images stored" in result.err
    shard_set = open_shard_set(tmp_path / "out")
    assert shard_set.manifest["skipped"] == {"train": {"truncated": 8}}
    lines = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert [line["name"].partition(" ")[0] for line in lines] == [f"{number}_009.png" for number in range(8)]
    found = []
    for name in shard_set.splits:
        split = shard_set.split(name)
        tokens, labels = split.gather(np.arange(split.images))
        colors = np.rint(127.5 * (shard_set.palette.astype(float) + 1))[tokens].reshape(-1, 32, 32, 3)
        for image, label in zip(colors, labels, strict=True):
            errors = np.square(small[0] - image).mean(axis=(1, 2, 3))
            assert errors.min() < 120
            assert small[1][errors.argmin()] == label
            found.append(int(errors.argmin()))
    expected = [(n * 15 + p) % 60 for n in range(8) for p in range(15) if p != 9]
    assert sorted(found) == sorted(expected)
    assert 15 <= shard_set.split("valid").images <= 55


@pytest.mark.parametrize("kind", ["stream", "folder"])
def test_fold_valid_trains_on_the_validation_images(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, run: Run
) -> None:
    paths = {"stream": ("webdataset", "tars"), "folder": ("image_folder", "folder")}
    source_kind, fixture = paths[kind]
    options = ["--source.kind", source_kind, "--source.path", request.getfixturevalue(fixture), "--resolution", 8]
    options += ["--palette.colors", 16, "--valid_fraction", 0.25, "--max_skipped", 0.1]
    counts = {}
    for fold in ("false", "true"):
        assert run("shards", *options, "--fold_valid", fold, "--out", tmp_path / fold).code == 0
        shard_set = open_shard_set(tmp_path / fold)
        counts[fold] = [shard_set.split(name).images for name in ("train", "valid")]
    assert counts["true"] == [sum(counts["false"]), counts["false"][1]]


def test_several_views_of_a_skipped_image_count_once(tmp_path: Path, folder: Path, run: Run) -> None:
    victim = sorted((folder / "train/cat").iterdir())[0]
    victim.write_bytes(b"")
    options = ["--source.kind", "image_folder", "--source.path", folder, "--resolution", 8, "--palette.colors", 16]
    options += ["--views.train", 3, "--views.random_crop", "always", "--valid_fraction", 0, "--max_skipped", 0.1]
    assert run("shards", *options, "--out", tmp_path / "out").code == 0
    shard_set = open_shard_set(tmp_path / "out")
    assert shard_set.manifest["skipped"] == {"train": {"empty": 1}}
    assert shard_set.split("train").images == 3 * 47


def test_one_damaged_tar_of_eight_exceeds_max_skipped(tmp_path: Path, tars: Path, run: Run) -> None:
    damaged = tars / "00003.tar"
    damaged.write_bytes(damaged.read_bytes()[:5000])
    options = ["--source.kind", "webdataset", "--source.path", tars, "--resolution", 8, "--palette.colors", 16]
    refused = run("shards", *options, "--max_skipped", 0.1, "--out", tmp_path / "out")
    assert refused.code == 2
    assert "1 of 8 tars can't be used" in refused.err
    assert not (tmp_path / "out/shards.json").exists()
    assert run("shards", *options, "--max_skipped", 0.15, "--out", tmp_path / "out").code == 0
    assert open_shard_set(tmp_path / "out").manifest["skipped"]["train"]["damaged tar"] == 1


@pytest.mark.parametrize("kind", ["stream", pytest.param("folder", marks=pytest.mark.slow)])
def test_kills_at_ten_random_moments_do_not_change_the_result(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """SIGKILL to the entire process group; then an uninterrupted run."""
    small = request.getfixturevalue("small")
    if kind == "stream":
        (tmp_path / "tars").mkdir()
        content = [(f"{n:04d}.png", encode_image(small[0][n % 60])) for n in range(600)]
        for number in range(12):
            (tmp_path / f"tars/{number:05d}.tar").write_bytes(tar_bytes(content[number * 50 : number * 50 + 50]))
        options = ["--source.kind", "webdataset", "--source.path", str(tmp_path / "tars")]
    else:
        options = ["--source.kind", "photographs"]

    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "data_prep", "shards", *options, "--workers", "2", "--resolution", "8"]
        command += ["--palette.colors", "16", "--out", str(out)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **quiet)

    began = time.monotonic()
    assert start(tmp_path / "unbroken").wait() == 0
    seconds = time.monotonic() - began
    moments = random.Random(0)
    for _ in range(10):
        process = start(tmp_path / "killed")
        time.sleep(moments.uniform(0.2, 0.95) * seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert start(tmp_path / "killed").wait() == 0
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "unbroken")
