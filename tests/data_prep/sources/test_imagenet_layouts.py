"""Miniatures of ImageNet in its official layouts, compared with the layouts' own files, and prepared by the command."""

import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat

from data_prep.images.decode import BadImage, Decoder
from data_prep.shards.reader import open_shard_set
from data_prep.sources.base import Source
from tests.data_prep.sources import official_layouts as layouts
from tests.data_prep.sources.reading import (
    Expected,
    check_shards,
    files_in,
    found,
    opened,
    opened_jpeg,
    read,
    reduced,
)

WNIDS = sorted(layouts.SYNSETS)


@pytest.fixture
def imagenet(tmp_path: Path, windows: list[np.ndarray]) -> Path:
    layouts.write_imagenet(tmp_path / "imagenet", windows)
    return tmp_path / "imagenet"


def imagenet_train(root: Path) -> Expected:
    return {read(file): file.parent.name for file in root.glob("train/*/*.JPEG")}


def imagenet_truth(devkit: Path) -> list[str]:
    """The wnid of each validation image, in the order of their numbers."""
    synsets = loadmat(devkit / "data/meta.mat", squeeze_me=True)["synsets"]
    wnid_of = {int(row[0]): str(row[1]) for row in synsets}
    lines = (devkit / "data/ILSVRC2012_validation_ground_truth.txt").read_text().splitlines()
    return [wnid_of[int(line)] for line in lines]


def imagenet_val(root: Path) -> Expected:
    images = sorted(root.glob("val/*.JPEG"))
    return dict(zip(map(read, images), imagenet_truth(root / layouts.DEVKIT), strict=True))


def check_imagenet(source: Source, train: Expected, val: Expected | None) -> None:
    assert source.facts["wnids"] == WNIDS
    assert sorted(source.splits) == (["test", "train"] if val else ["train"])
    assert found(source, "train", WNIDS) == train
    assert val is None or found(source, "test", WNIDS) == val


def words_of_meta(devkit: Path) -> list[str]:
    synsets = loadmat(devkit / "data/meta.mat", squeeze_me=True)["synsets"]
    words = {str(row["WNID"]): str(row["words"]) for row in synsets}
    return [words[wnid] for wnid in WNIDS]


def test_imagenet_of_folders_with_the_flat_validation_set(imagenet: Path) -> None:
    source = opened("imagenet", imagenet)
    check_imagenet(source, imagenet_train(imagenet), imagenet_val(imagenet))
    assert source.classes == words_of_meta(imagenet / layouts.DEVKIT)
    assert source.classes[1] == source.classes[3] == "crane"
    assert len(set(imagenet_truth(imagenet / layouts.DEVKIT))) == 5


def test_imagenet_of_the_unextracted_tars(imagenet: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    layouts.pack_imagenet(imagenet, packed)
    train = {
        read(image): name.removesuffix(".tar")
        for name, content in files_in(packed / "ILSVRC2012_img_train.tar")
        for _, image in files_in(io.BytesIO(content))
    }
    images = dict(files_in(packed / "ILSVRC2012_img_val.tar"))
    truth = imagenet_truth(imagenet / layouts.DEVKIT)
    val = {read(images[f"ILSVRC2012_val_{n:08d}.JPEG"]): wnid for n, wnid in enumerate(truth, 1)}
    source, folders = opened("imagenet", packed), opened("imagenet", imagenet)
    check_imagenet(source, train, val)
    assert source.classes == folders.classes
    assert source.fingerprint == folders.fingerprint
    for split in ("train", "test"):  # the same order too, so that the shards are the same
        assert (source.splits[split].labels == folders.splits[split].labels).all()
        assert list(source.splits[split].names) == list(folders.splits[split].names)  # type: ignore[attr-defined]


def test_imagenet_as_kaggle_has_it(imagenet: Path) -> None:
    train, val = imagenet_train(imagenet), imagenet_val(imagenet)
    layouts.to_kaggle(imagenet)
    source = opened("imagenet", imagenet)
    check_imagenet(source, train, val)
    lines = (imagenet / "LOC_synset_mapping.txt").read_text().splitlines()
    assert source.classes == [line.split(" ", 1)[1] for line in lines]


def test_imagenet_with_validation_images_in_class_folders(imagenet: Path) -> None:
    train, val = imagenet_train(imagenet), imagenet_val(imagenet)
    for image, wnid in zip(sorted(imagenet.glob("val/*.JPEG")), imagenet_truth(imagenet / layouts.DEVKIT), strict=True):
        (imagenet / "val" / wnid).mkdir(exist_ok=True)
        image.rename(imagenet / "val" / wnid / image.name)
    shutil.rmtree(imagenet / layouts.DEVKIT)
    source = opened("imagenet", imagenet)
    check_imagenet(source, train, val)
    assert source.classes == WNIDS


def test_imagenet_without_validation_images(imagenet: Path) -> None:
    shutil.rmtree(imagenet / "val")
    check_imagenet(opened("imagenet", imagenet), imagenet_train(imagenet), None)


def test_a_changed_ground_truth_changes_the_fingerprint(imagenet: Path) -> None:
    before = opened("imagenet", imagenet).fingerprint
    truth = imagenet / layouts.DEVKIT / "data/ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("".join(sorted(truth.read_text().splitlines(True))))
    assert opened("imagenet", imagenet).fingerprint != before


def damage_imagenet(root: Path, how: str) -> None:
    devkit, truth = root / layouts.DEVKIT, root / layouts.DEVKIT / "data/ILSVRC2012_validation_ground_truth.txt"
    match how:
        case "no folder":
            shutil.rmtree(root)
        case "no train":
            shutil.rmtree(root / "train")
        case "no classes":
            shutil.rmtree(root / "train")
            (root / "train").mkdir()
        case "empty class":
            for file in (root / "train/n02119789").iterdir():
                file.unlink()
        case "empty val":
            for file in (root / "val").iterdir():
                file.unlink()
        case "no truth":
            shutil.rmtree(devkit)
        case "short truth":
            truth.write_text(truth.read_text()[:-2])
        case "strange truth":
            truth.write_text(truth.read_text().replace("3", "1001"))
        case "other name":
            (root / "val/ILSVRC2012_val_00000003.JPEG").rename(root / "val/ILSVRC2012_val_00000009.JPEG")
        case "no meta":
            (devkit / "data/meta.mat").unlink()
        case "damaged meta":
            (devkit / "data/meta.mat").write_bytes((devkit / "data/meta.mat").read_bytes()[:200])
        case "class missing":
            shutil.rmtree(root / "train/n03126707")
        case "strange class":
            (root / "train/n02119789").rename(root / "train/n02083346")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no folder", "imagenet is not a folder; it must be a folder with train/ or ILSVRC2012_img_train.tar"),
        ("no train", "has neither the folder train/ nor ILSVRC2012_img_train.tar"),
        ("no classes", "train has no folders named by WordNet ids"),
        ("empty class", "n02119789 has no images"),
        ("empty val", "val has no images"),
        ("no truth", r"put ILSVRC2012_devkit_t12.tar.gz \(or LOC_val_solution.csv\) into .*imagenet"),
        ("short truth", r"val has 8 images, but .*ground_truth.txt has classes for 7"),
        ("strange truth", "ground_truth.txt has '1001' in line 4"),
        ("other name", "has no class for ILSVRC2012_val_00000009"),
        ("no meta", "devkit_t12 has no data/meta.mat"),
        ("damaged meta", "meta.mat can't be read"),
        ("class missing", "val has images of n03126707, a class that the training set does not have"),
        ("strange class", "has the class n02083346, which is not in .*meta.mat"),
    ],
)
def test_errors_of_imagenet_are_named(imagenet: Path, how: str, message: str) -> None:
    damage_imagenet(imagenet, how)
    with pytest.raises(ValueError, match=message) as caught:
        opened("imagenet", imagenet)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["train", "class", "val", "header", "devkit"])
def test_a_damaged_tar_of_imagenet_is_named(imagenet: Path, tmp_path: Path, where: str) -> None:
    packed = tmp_path / "packed"
    layouts.pack_imagenet(imagenet, packed)
    train, val, devkit = (packed / name for name in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "x"))
    message = {
        "train": r"img_train.tar is truncated",
        "class": r"img_train.tar/n\d{8}.tar is damaged, or not an uncompressed tar, at byte \d+",
        "val": r"img_val.tar is truncated in ILSVRC2012_val_0000000\d.JPEG",
        "header": r"img_val.tar is damaged, or not an uncompressed tar, at byte \d+",
        "devkit": r"devkit_t12.tar.gz is not a readable tar archive",
    }[where]
    with tarfile.open(train if where in ("train", "class") else val) as archive:
        members = archive.getmembers()
    match where:
        case "train":
            train.write_bytes(train.read_bytes()[: members[3].offset])
        case "class":  # the second header in a class's tar
            content = bytearray(train.read_bytes())
            with tarfile.open(fileobj=io.BytesIO(content[members[2].offset_data :])) as inner:
                second = members[2].offset_data + inner.getmembers()[1].offset
            content[second + 20] ^= 1
            train.write_bytes(content)
        case "val":
            val.write_bytes(val.read_bytes()[: members[4].offset_data + 100])
        case "header":
            content = bytearray(val.read_bytes())
            content[members[4].offset + 3] ^= 1
            val.write_bytes(content)
        case "devkit":
            devkit = packed / f"{layouts.DEVKIT}.tar.gz"
            devkit.write_bytes(devkit.read_bytes()[:-300])
    with pytest.raises(ValueError, match=message):
        opened("imagenet", packed)


def test_a_tar_that_shrinks_has_bad_images(imagenet: Path, tmp_path: Path) -> None:
    layouts.pack_imagenet(imagenet, tmp_path / "packed")
    images = opened("imagenet", tmp_path / "packed").splits["test"]
    with (tmp_path / "packed/ILSVRC2012_img_val.tar").open("r+b") as file:
        file.truncate(700)
    with pytest.raises(BadImage) as caught:
        images.image(5, Decoder())
    assert caught.value.reason == "unreadable"
    assert caught.value.name.endswith("ILSVRC2012_img_val.tar/ILSVRC2012_val_00000006.JPEG")


def test_imagenet_prepared_from_folders_and_from_tars(
    imagenet: Path, tmp_path: Path, prepare: Callable[..., Path]
) -> None:
    layouts.pack_imagenet(imagenet, tmp_path / "packed")
    train = {reduced(opened_jpeg(file)): WNIDS.index(file.parent.name) for file in imagenet.glob("train/*/*.JPEG")}
    truth = imagenet_truth(imagenet / layouts.DEVKIT)
    images = sorted(imagenet.glob("val/*.JPEG"))
    test = {reduced(opened_jpeg(file)): WNIDS.index(wnid) for file, wnid in zip(images, truth, strict=True)}
    shards = [prepare("imagenet", path, "--valid_fraction", "0.2") for path in (imagenet, tmp_path / "packed")]
    for out in shards:
        check_shards(out, {"train": train, "test": test}, words_of_meta(imagenet / layouts.DEVKIT))
        manifest = open_shard_set(out).manifest
        assert manifest["source"]["wnids"] == WNIDS
        assert manifest["splits"]["valid"]["images"] == 3
    folders, tars = ([file.read_bytes() for file in sorted(out.glob("*.tar"))] for out in shards)
    assert folders == tars
