"""Images of valid and test that are also in train, against sets of their tokens."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.shards.overlap import Overlap, token_digests
from data_prep.shards.reader import ShardSet, open_shard_set
from tests.data_prep.small_data import CLASSES
from tests.data_prep.tar_files import encode_image, tar_bytes

Run = Callable[..., Any]


def by_sets(shards: ShardSet) -> dict[str, int]:
    """The images of each split whose tokens train has too."""
    rows = {
        name: [row.tobytes() for row in shards.split(name).gather(np.arange(shards.split(name).images))[0]]
        for name in shards.splits
    }
    train = set(rows.pop("train"))
    return {name: sum(row in train for row in found) for name, found in rows.items()}


def test_digests_of_equal_images_are_equal() -> None:
    tokens = np.random.default_rng(0).integers(0, 512, (100, 64)).astype(np.uint16)
    tokens[50] = tokens[3]
    digests = token_digests(tokens)
    assert digests.shape == (100,) and len(set(digests.tolist())) == 99 and digests[50] == digests[3]
    assert (token_digests(np.asfortranarray(tokens)[::2]) == digests[::2]).all()


def test_counts_against_sets() -> None:
    random = np.random.default_rng(1)
    images = {name: random.integers(0, 300, count) for name, count in (("valid", 40), ("test", 90), ("train", 100))}
    overlap = Overlap()
    for name, numbers in images.items():
        for part in np.array_split(numbers.astype(np.uint64), 3):
            overlap.add(name, part)
    expected = {name: int(np.isin(images[name], images["train"]).sum()) for name in ("valid", "test")}
    assert overlap.counts() == expected and min(expected.values()) > 0


def test_a_set_without_other_splits() -> None:
    overlap = Overlap()
    overlap.add("train", np.arange(3, dtype=np.uint64))
    assert overlap.counts() == {}


def test_shards_and_verify_count_them(folder: Path, options: list[str], tmp_path: Path, run: Run) -> None:
    copied = sorted(folder.glob("train/*/*.png"))[:5]
    for number, file in enumerate(copied):
        (folder / "test" / file.parent.name / f"copy{number}.png").write_bytes(file.read_bytes())
    out = tmp_path / "set"
    result = run("shards", *options, "--valid_fraction", "0", "--out", out)
    shards = open_shard_set(out)
    counts = by_sets(shards)
    assert result.code == 0 and counts["test"] >= 5
    assert shards.images_in_train == counts
    assert f"{counts['test']} of 17 images of test are also in train (equal tokens), so results on test" in result.err
    assert f"{counts['test']} of them also in train" in result.err
    manifest = json.loads((out / "shards.json").read_text())
    del manifest["splits"]["test"]["images_in_train"]  # as sets that were prepared before have it
    (out / "shards.json").write_text(json.dumps(manifest))
    assert open_shard_set(out).images_in_train == {}
    verified = run("verify", out)
    assert verified.code == 0
    assert f"{out}: {counts['test']} of 17 images of test are also in train (equal tokens)" in verified.err


@pytest.mark.parametrize("parts", [1, 2])
def test_tars_and_parts_count_them(small: tuple[Any, Any], tmp_path: Path, run: Run, parts: int) -> None:
    for split, first, last in (("train", 0, 30), ("train", 20, 40), ("valid", 25, 45)):
        members = [(f"{n:03d}.png", encode_image(small[0][n])) for n in range(first, last)]
        (tmp_path / "in" / split).mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / split / f"{first:05d}.tar").write_bytes(tar_bytes(members))
    out = tmp_path / "set"
    options = ["--source.kind", "webdataset", "--source.path", tmp_path / "in", "--resolution", "8", "--workers", "1"]
    options += ["--palette.colors", "64", "--out", out]
    if parts > 1:
        assert run("palette", *options[:-1], tmp_path / "palette.npy").code == 0
        options += ["--palette.file", tmp_path / "palette.npy", "--parts", parts]
        assert [run("shards", *options, "--part", part).code for part in (2, 1)] == [0, 0]
        assert run("join", out).code == 0
    else:
        assert run("shards", *options).code == 0
    shards = open_shard_set(out)
    assert shards.images_in_train == by_sets(shards)
    assert 15 <= shards.images_in_train["valid"] <= 20


def test_folded_validation_images_are_no_surprise(options: list[str], tmp_path: Path, run: Run) -> None:
    result = run("shards", *options, "--fold_valid", "true", "--out", tmp_path / "set")
    assert open_shard_set(tmp_path / "set").images_in_train["valid"] == 12
    assert "images of valid are also" not in result.err and len(CLASSES) == 3
