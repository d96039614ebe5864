"""shards --exclude: what is excluded, that it is exact and repeatable, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import data_prep.build.build
import data_prep.build.plan
from data_prep.images.near_duplicates import look_of
from data_prep.shards.reader import open_shard_set
from tests.data_prep.small_data import write_folder
from tests.data_prep.tar_files import encode_image, tar_bytes
from tests.data_prep.test_errors import assert_one_sentence
from tests.launch import files_of

Small = tuple[np.ndarray, np.ndarray]
Run = Callable[..., Any]
COPIED = (1, 23, 44)
"""Images of train, of which the excluded ones are copies."""


@pytest.fixture
def excluded(tmp_path: Path, small: Small) -> Path:
    """A JPEG, a smaller and a mirrored copy of training images, one of a test image, and a blank page."""
    folder = tmp_path / "theirs"
    (folder / "more").mkdir(parents=True)
    first, second, third = (small[0][index] for index in COPIED)
    Image.fromarray(first).save(folder / "first.jpg")
    Image.fromarray(second).resize((24, 24), Image.Resampling.BOX).save(folder / "more/second.png")
    Image.fromarray(third[:, ::-1]).save(folder / "more/third.png")
    Image.fromarray(small[0][0]).save(folder / "of_test.png")
    Image.new("RGB", (32, 32), "white").save(folder / "blank.png")
    return folder


def expected(small: Small, excluded: Path) -> list[int]:
    """The training images that a comparison of all pairs finds, by numpy."""
    theirs = [look_of(np.asarray(Image.open(file).convert("RGB"))) for file in sorted(excluded.rglob("*.*"))]
    theirs = [look for look in theirs if look.thumbnail.std() >= 8]
    found = []
    for index in (index for index in range(60) if index % 5):
        for look in (look_of(small[0][index]), look_of(small[0][index][:, ::-1])):
            for one in theirs:
                same = np.corrcoef(look.thumbnail.ravel(), one.thumbnail.ravel())[0, 1] >= 0.9
                if same and (int(look.code) ^ int(one.code)).bit_count() <= 10:
                    found.append(index)
    return sorted(set(found))


def skipped(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["folder", pytest.param("tars", marks=pytest.mark.slow)])
def test_near_duplicates_are_listed_and_not_stored(
    kind: str, tmp_path: Path, options: list[str], excluded: Path, small: Small, run: Run
) -> None:
    """Of train and of the valid that is held out of it; a copy in the source's own test stays. max_skipped does not
    limit them."""
    if kind == "tars":
        for split, rest in (("train", range(1, 5)), ("test", range(1))):
            members = [(f"{i}.png", encode_image(small[0][i])) for i in range(60) if i % 5 in rest]
            (tmp_path / f"tars/{split}").mkdir(parents=True)
            (tmp_path / f"tars/{split}/0.tar").write_bytes(tar_bytes(members))
        options += ["--source.kind", "webdataset", "--source.path", str(tmp_path / "tars")]
    out = tmp_path / "out"
    result = run("shards", *options, "--max_skipped", 0, "--exclude", excluded, "--out", out)
    assert result.code == 0, result.err
    wanted = expected(small, excluded)
    assert set(COPIED) <= set(wanted) and len(wanted) < 6
    assert f"60 source images, 0 skipped, {len(wanted)} near-duplicates of excluded images" in result.err
    assert "5 images of a folder, 1 flat and 0 unusable ones are not searched" in result.err
    lines = skipped(out)
    assert {line["reason"] for line in lines} == {"near-duplicate"}
    details = {line["detail"] for line in lines}
    assert any(f"of {excluded}/more/third.png, 0 of 64 bits differ" in detail for detail in details)
    shard_set = open_shard_set(out)
    sizes = {name: shard_set.split(name).images for name in shard_set.splits}
    assert sizes["test"] == 12
    assert sizes["train"] + sizes["valid"] == 48 - len(wanted)
    manifest = shard_set.manifest
    assert manifest["excluded"]["hashed"] == 4
    assert [(one["name"], one["images"]) for one in manifest["excluded"]["sets"]] == [("theirs", 5)]
    assert sum(sum(reasons.values()) for reasons in manifest["skipped"].values()) == len(wanted)
    assert str(tmp_path) not in json.dumps([manifest["excluded"], manifest["config"]["exclude"]])
    if kind == "folder":
        assert "some are excluded" in run("show", out, "--out", tmp_path / "grid.png").err


def test_a_shard_set_is_compared_as_it_is_stored(
    tmp_path: Path, options: list[str], excluded: Path, small: Small, run: Run
) -> None:
    """Its split test, in the colors of its palette; a copy in its train does not count."""
    theirs = tmp_path / "source"
    write_folder(theirs / "train", small[0][::5], small[1][::5])
    for file in excluded.rglob("*.*"):
        (theirs / "test/cat").mkdir(parents=True, exist_ok=True)
        shutil.copy(file, theirs / "test/cat" / file.name)
    kind = ["--source.kind", "image_folder", "--source.path", theirs, "--workers", 1]
    assert run("shards", *kind, "--resolution", 32, "--palette.colors", 64, "--out", tmp_path / "set").code == 0
    result = run("shards", *options, "--exclude", tmp_path / "set", "--out", tmp_path / "out")
    assert result.code == 0, result.err
    names = sorted(Path(line["name"]).name for line in skipped(tmp_path / "out"))
    assert len(names) == len(expected(small, excluded))
    assert all(f" of {tmp_path / 'set'}, " in line["detail"] for line in skipped(tmp_path / "out"))


@pytest.mark.slow
def test_interruptions_workers_and_parts_change_nothing(
    tmp_path: Path, options: list[str], excluded: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_prep.build.plan, "IMAGES_PER_RECORD", 4)
    monkeypatch.setattr(data_prep.build.plan, "IMAGES_PER_SHARD", 8)
    options += ["--exclude", str(excluded)]
    assert run("palette", *options, "--out", tmp_path / "palette.npy").code == 0
    assert run("shards", *options, "--workers", 2, "--out", tmp_path / "fitted").code == 0
    assert (tmp_path / "fitted/palette.npy").read_bytes() == (tmp_path / "palette.npy").read_bytes()
    options += ["--palette.file", str(tmp_path / "palette.npy")]
    assert run("shards", *options, "--out", tmp_path / "one").code == 0
    for part in (2, 1):
        assert run("shards", *options, "--out", tmp_path / "parts", "--part", part, "--parts", 2).code == 0
    assert run("join", tmp_path / "parts").code == 0

    writer, written = data_prep.build.build.open_shard, []

    def write_some(path: Path) -> Any:
        written.append(path)
        if len(written) == 4:
            raise OSError(28, "No space left on device", str(path))
        return writer(path)

    monkeypatch.setattr(data_prep.build.build, "open_shard", write_some)
    out = tmp_path / "broken"
    assert run("shards", *options, "--out", out).code == 2
    (excluded / "first.jpg").rename(tmp_path / "first.jpg")
    assert_one_sentence(run("shards", *options, "--out", out), "was prepared with exclude ['folder theirs sha256")
    without = run("shards", *options[:-4], *options[-2:], "--out", out)
    assert_one_sentence(without, "was prepared with exclude ['folder theirs sha256", "but it is now its default")
    (tmp_path / "first.jpg").rename(excluded / "first.jpg")
    assert_one_sentence(
        run("shards", *options, "--exclude_distance", 4, "--out", out), "exclude_distance 10, but it is now 4"
    )
    assert run("shards", *options, "--out", out).code == 0
    assert files_of(out) == files_of(tmp_path / "one") == files_of(tmp_path / "parts")
    assert "is finished" in run("shards", *options, "--out", out).err


def test_parts_of_a_palette_have_the_same_excluded_images(
    tmp_path: Path, options: list[str], excluded: Path, small: Small, run: Run
) -> None:
    """The folder may move; an image of it may not change, even to one of the same size."""

    def part(number: int, folder: Path) -> Any:
        more = ["--part", number, "--parts", 2, "--exclude_distance", 9]
        return run("palette", *options, "--exclude", folder, *more, "--out", tmp_path / "palette.npy")

    page = Image.fromarray(small[0][7])
    page.save(excluded / "page.bmp")
    assert part(1, excluded).code == 0
    Image.fromarray(small[0][8]).save(excluded / "page.bmp")
    assert_one_sentence(part(2, excluded), "was prepared with excluded.hashes_sha256", "but it is now")
    page.save(excluded / "page.bmp")
    (tmp_path / "moved").mkdir()
    moved = shutil.move(excluded, tmp_path / "moved" / excluded.name)
    assert part(2, moved).code == 0
    assert run("join", tmp_path / "palette.npy").code == 0
    whole = ["--exclude", moved, "--exclude_distance", 9]
    assert run("palette", *options, *whole, "--out", tmp_path / "whole.npy").code == 0
    assert (tmp_path / "whole.npy").read_bytes() == (tmp_path / "palette.npy").read_bytes()


def test_without_the_option_the_manifest_has_nothing_of_it(shards: Path) -> None:
    manifest = json.loads((shards / "shards.json").read_text())
    assert not {"exclude", "exclude_distance", "where"} & {*manifest["config"], *manifest["config"]["source"]}
    assert not {"excluded", "filtered"} & manifest.keys()


def test_what_is_refused(
    tmp_path: Path, options: list[str], folder: Path, shards: Path, excluded: Path, run: Run
) -> None:
    def refused(*words: str, exclude: list[Any], more: tuple[Any, ...] = ()) -> None:
        added = ["--exclude", *exclude] if exclude else []
        result = run("shards", *options, *added, *more, "--out", tmp_path / "out")
        assert_one_sentence(result, *words)
        assert not (tmp_path / "out").exists()

    refused("exclude nowhere does not exist; it must be a shard set or a folder of images.", exclude=["nowhere"])
    file = excluded / "first.jpg"
    refused(f"exclude {file} is a file; it must be a shard set or a folder", exclude=[file])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").write_text("a")
    refused("empty has no shards.json and no images; it must be", "ignored", "notes.txt", exclude=[tmp_path / "empty"])
    refused(f"exclude {folder} has folders of splits (test/, train/)", f"such as {folder / 'test'}.", exclude=[folder])
    refused(f"exclude has {excluded} twice, or a copy of it; remove one.", exclude=[excluded, excluded])
    for distance in (-1, 65):
        more = ("--exclude_distance", distance)
        refused(f"exclude_distance is {distance}; it must be between 0 and 64", exclude=[excluded], more=more)
    refused("exclude_distance is 4, but exclude is not set", exclude=[], more=("--exclude_distance", 4))
    (tmp_path / "one.yaml").write_text(f"exclude: {excluded}\n")
    refused("exclude is", "it must be a list in brackets", exclude=[], more=("--config", tmp_path / "one.yaml"))
    refused("argument --exclude: expected at least one argument", exclude=[], more=("--exclude",))
    (excluded / "damaged.png").write_bytes(b"")
    refused("theirs: 1 of 6 images can't be used", "damaged.png: empty", exclude=[excluded])
    blank = tmp_path / "blank"
    blank.mkdir()
    Image.new("RGB", (32, 32), "white").save(blank / "page.png")
    refused("blank has 1 images, all of them flat or unusable", exclude=[blank])
    shutil.rmtree(folder / "test")
    assert run("shards", *options, "--out", tmp_path / "untested").code == 0
    refused("is a shard set with only train, valid; it must have test", exclude=[tmp_path / "untested"])
    (shards / "shards.json").write_text("{}")
    refused("shards.json is not a manifest", exclude=[shards])
