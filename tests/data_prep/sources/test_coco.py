"""Miniatures of COCO in its official layouts, compared with the layouts' own files, and prepared by the command."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep.shards.reader import open_shard_set
from tests.data_prep.sources import official_layouts as layouts
from tests.data_prep.sources.reading import (
    Expected,
    check_shards,
    found,
    opened,
    opened_jpeg,
    opened_with_peak,
    read,
    reduced,
)


@pytest.fixture
def coco(tmp_path: Path, windows: list[np.ndarray]) -> Path:
    layouts.write_coco(tmp_path / "coco", windows)
    return tmp_path / "coco"


def coco_split(root: Path, name: str) -> Expected:
    """An image's largest object, by a plain loop over the annotations."""
    whole = json.loads((root / f"annotations/instances_{name}.json").read_text())
    names = {category["id"]: category["name"] for category in whole["categories"]}
    expected: Expected = {}
    for image in whole["images"]:
        objects = [a for a in whole["annotations"] if a["image_id"] == image["id"] and not a["iscrowd"]]
        largest = min(objects, key=lambda a: (-a["area"], a["id"]), default=None)
        expected[read(root / name / image["file_name"])] = largest and names[largest["category_id"]]
    return expected


@pytest.mark.parametrize("year", ["2017", "2014"])
def test_coco(tmp_path: Path, windows: list[np.ndarray], year: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.sources.coco.CHUNK", 100)  # so that values lie across the chunks that are read
    layouts.write_coco(tmp_path, windows, year)
    source = opened("coco", tmp_path)
    assert source.name == f"COCO {year}"
    assert source.classes == ["person", "car", "dog", "chair", "toothbrush"]
    train, val = coco_split(tmp_path, f"train{year}"), coco_split(tmp_path, f"val{year}")
    assert sorted(map(str, train.values())) == ["None", "None", "car", "chair", "dog", "toothbrush"]
    assert found(source, "train") == train
    assert found(source, "test") == val
    assert "largest object" in source.facts["labels"]


def test_coco_without_validation_images_and_with_others(
    coco: Path, windows: list[np.ndarray], caplog: pytest.LogCaptureFixture
) -> None:
    expected = coco_split(coco, "train2017")
    shutil.rmtree(coco / "val2017")
    layouts.write(coco / "train2017/000000999999.jpg", layouts.jpeg(windows[30]))  # is not listed
    with caplog.at_level(logging.INFO):
        source = opened("coco", coco)
    assert list(source.splits) == ["train"]
    assert found(source, "train") == expected
    assert "ignored 1 files that instances_train2017.json does not list (000000999999.jpg)" in caplog.text


def test_a_changed_label_changes_cocos_fingerprint(coco: Path) -> None:
    before = opened("coco", coco).fingerprint
    file = coco / "annotations/instances_val2017.json"
    file.write_text(file.read_text().replace('"area": 11.0', '"area": 9.0'))
    assert opened("coco", coco).fingerprint != before


def damage_coco(root: Path, how: str) -> None:
    file = root / "annotations/instances_train2017.json"
    whole = json.loads(file.read_text())
    match how:
        case "no train":
            shutil.rmtree(root / "train2017")
        case "no annotations":
            file.unlink()
        case "not extracted":
            shutil.rmtree(root / "val2017")
            (root / "val2017.zip").touch()
        case "cut off":
            file.write_text(file.read_text()[:-40])
        case "garbage":
            file.write_text(file.read_text().replace('"annotations": [{', '"annotations": [{]', 1))
        case "not an object":
            file.write_text("[]")
        case "no images":
            file.write_text(json.dumps(whole | {"images": []}))
        case "captions":
            file.write_text(json.dumps(whole | {"annotations": [{"image_id": 9, "id": 1, "caption": "a dog"}]}))
        case "strange category":
            whole["annotations"][0]["category_id"] = 91
            file.write_text(json.dumps(whole))
        case "strange image":
            whole["annotations"][0]["image_id"] = 8
            file.write_text(json.dumps(whole))
        case "images missing":
            (root / "train2017/000000000025.jpg").unlink()
            (root / "train2017/000000000036.jpg").unlink()
        case "other categories":
            whole["categories"][0]["name"] = "tooth brush"
            file.write_text(json.dumps(whole))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no train", r"coco has no folder train2017 \(or train2014\)"),
        ("no annotations", "instances_train2017.json is missing; extract annotations_trainval2017.zip"),
        ("not extracted", "coco has val2017.zip, but no val2017/; extract it, or remove it"),
        ("cut off", r"instances_train2017.json is not readable as JSON \(.* at character \d+\)"),
        ("garbage", r"instances_train2017.json is not readable as JSON \(.* at character \d+\)"),
        ("not an object", r"instances_train2017.json is not readable as JSON \('\[' instead of '{' at character 0\)"),
        ("no images", "instances_train2017.json lists no images"),
        ("captions", "instances_train2017.json has an invalid entry in annotations .*iscrowd"),
        ("strange category", "has an annotation with category_id 91"),
        ("strange image", "has an annotation with image_id 8"),
        ("images missing", "train2017 is missing 2 of the 6 images .*, the first is 000000000025.jpg"),
        ("other categories", "instances_val2017.json has other categories"),
    ],
)
def test_errors_of_coco_are_named(coco: Path, how: str, message: str) -> None:
    damage_coco(coco, how)
    with pytest.raises(ValueError, match=message) as caught:
        opened("coco", coco)
    assert "\n" not in str(caught.value)


def test_coco_prepared(coco: Path, prepare: Callable[..., Path]) -> None:
    classes = ["person", "car", "dog", "chair", "toothbrush"]
    splits: dict[str, Expected] = {}
    for split, name in (("train", "train2017"), ("test", "val2017")):
        label_of = {
            pixels: -1 if category is None else classes.index(category)
            for pixels, category in coco_split(coco, name).items()
        }
        images = [opened_jpeg(file) for file in (coco / name).iterdir()]
        splits[split] = {reduced(one): label_of[one.tobytes()] for one in images}
    out = prepare("coco", coco)
    check_shards(out, splits, classes)
    assert "largest object" in open_shard_set(out).manifest["source"]["labels"]


def test_large_annotations_take_little_memory(coco: Path) -> None:
    """The outlines are most of the file, and are released one by one."""
    file = coco / "annotations/instances_train2017.json"
    whole = json.loads(file.read_text())
    rows = [
        {"segmentation": [[n + 0.25 for n in range(1000)]], "area": float(row), "iscrowd": 0}
        | {"image_id": 36, "bbox": [0, 0, 1, 1], "category_id": 62, "id": row}
        for row in range(2000)
    ]
    file.write_bytes(layouts.coco_json(whole["images"], rows))
    del rows
    assert file.stat().st_size > 15e6
    source, _, peak = opened_with_peak("coco", coco)
    assert source.splits["train"].labels.tolist() == [-1, -1, -1, -1, 3, -1]
    assert peak < 8e6
