"""Miniatures in the true layouts of ImageNet, STL-10, COCO and Places205, checked against the layouts' own files; and
these, CIFAR and Hugging Face's prepared by the command."""

import io
import json
import shutil
import tarfile
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat

from data_prep.config import SourceConfig
from data_prep.images.crops import area_resize
from data_prep.images.decode import BadPicture, Decoder
from data_prep.shards.reader import open_shard_set
from data_prep.sources.base import Source
from data_prep.sources.open import open_source
from tests.data_prep.small_data import archive_of
from tests.data_prep.sources import official_layouts as layouts

CONFIGS = Path(__file__).parents[3] / "configs/data"
Expected = dict[bytes, Any]
"""Each picture's pixels to its class."""


@pytest.fixture(scope="module")
def windows() -> list[np.ndarray]:
    """Forty different windows of photographs, of 64 to 256 pixels."""
    pictures = open_source(SourceConfig(kind="photographs", train_per_class=4)).splits["train"]
    return [np.ascontiguousarray(pictures.picture(index, Decoder())) for index in range(40)]


def opened(kind: str, path: Path, **options: object) -> Source:
    return open_source(SourceConfig(kind=kind, path=str(path), **options))


def found(source: Source, split: str, classes: list[str] | None = None) -> Expected:
    """What the source says, in the form of what is expected; unlabelled pictures have class None."""
    pictures = source.splits[split]
    assert pictures.labels.dtype == np.int32
    assert pictures.labels.shape == (len(pictures),)
    pixels = [pictures.picture(index, Decoder()) for index in range(len(pictures))]
    assert all(one.dtype == np.uint8 and one.shape[2] == 3 for one in pixels)
    classes = source.classes if classes is None else classes
    named = [None if label < 0 else classes[label] for label in pictures.labels.tolist()]
    answer = dict(zip((one.tobytes() for one in pixels), named, strict=True))
    assert len(answer) == len(pixels)
    return answer


def read(content: bytes | Path) -> bytes:
    """Pixels, by Pillow."""
    image = Image.open(io.BytesIO(content) if isinstance(content, bytes) else content)
    return np.asarray(image.convert("RGB")).tobytes()


def files_in(tar: Path | io.BytesIO) -> Iterable[tuple[str, bytes]]:
    with tarfile.open(tar) if isinstance(tar, Path) else tarfile.open(fileobj=tar) as archive:
        for member in archive:
            file = archive.extractfile(member)
            assert file is not None
            yield member.name, file.read()


# --- ImageNet

WNIDS = sorted(layouts.SYNSETS)


@pytest.fixture
def imagenet(tmp_path: Path, windows: list[np.ndarray]) -> Path:
    layouts.write_imagenet(tmp_path / "imagenet", windows)
    return tmp_path / "imagenet"


def imagenet_train(root: Path) -> Expected:
    return {read(file): file.parent.name for file in root.glob("train/*/*.JPEG")}


def imagenet_truth(devkit: Path) -> list[str]:
    """The wnid of each validation picture, in the order of their numbers."""
    synsets = loadmat(devkit / "data/meta.mat", squeeze_me=True)["synsets"]
    wnid_of = {int(row[0]): str(row[1]) for row in synsets}
    lines = (devkit / "data/ILSVRC2012_validation_ground_truth.txt").read_text().splitlines()
    return [wnid_of[int(line)] for line in lines]


def imagenet_val(root: Path) -> Expected:
    pictures = sorted(root.glob("val/*.JPEG"))
    return dict(zip(map(read, pictures), imagenet_truth(root / layouts.DEVKIT), strict=True))


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
        read(picture): name.removesuffix(".tar")
        for name, content in files_in(packed / "ILSVRC2012_img_train.tar")
        for _, picture in files_in(io.BytesIO(content))
    }
    pictures = dict(files_in(packed / "ILSVRC2012_img_val.tar"))
    truth = imagenet_truth(imagenet / layouts.DEVKIT)
    val = {read(pictures[f"ILSVRC2012_val_{n:08d}.JPEG"]): wnid for n, wnid in enumerate(truth, 1)}
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


def test_imagenet_with_validation_pictures_in_class_folders(imagenet: Path) -> None:
    train, val = imagenet_train(imagenet), imagenet_val(imagenet)
    for picture, wnid in zip(
        sorted(imagenet.glob("val/*.JPEG")), imagenet_truth(imagenet / layouts.DEVKIT), strict=True
    ):
        (imagenet / "val" / wnid).mkdir(exist_ok=True)
        picture.rename(imagenet / "val" / wnid / picture.name)
    shutil.rmtree(imagenet / layouts.DEVKIT)
    source = opened("imagenet", imagenet)
    check_imagenet(source, train, val)
    assert source.classes == WNIDS


def test_imagenet_without_validation_pictures(imagenet: Path) -> None:
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
        ("no folder", "imagenet is no folder; it must be one that holds train/ or ILSVRC2012_img_train.tar"),
        ("no train", "holds neither the folder train/ nor ILSVRC2012_img_train.tar"),
        ("no classes", "train holds no folders named by WordNet ids"),
        ("empty class", "n02119789 holds no .JPEG pictures"),
        ("empty val", "val holds no .JPEG pictures"),
        ("no truth", r"put ILSVRC2012_devkit_t12.tar.gz \(or LOC_val_solution.csv\) into .*imagenet"),
        ("short truth", r"val holds 8 pictures, .*ground_truth.txt has the classes of 7"),
        ("strange truth", "ground_truth.txt has '1001' in line 4"),
        ("other name", "has no class for ILSVRC2012_val_00000009"),
        ("no meta", "devkit_t12 lacks data/meta.mat"),
        ("damaged meta", "meta.mat is not the devkit's"),
        ("class missing", "val has pictures of n03126707, a class that the training set lacks"),
        ("strange class", "has a class n02083346 that .*meta.mat lacks"),
    ],
)
def test_mistakes_about_imagenet_are_named(imagenet: Path, how: str, message: str) -> None:
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
        "train": r"img_train.tar is cut off",
        "class": r"img_train.tar/n\d{8}.tar is damaged, or no uncompressed tar, at byte \d+",
        "val": r"img_val.tar is cut off in ILSVRC2012_val_0000000\d.JPEG",
        "header": r"img_val.tar is damaged, or no uncompressed tar, at byte \d+",
        "devkit": r"devkit_t12.tar.gz is no readable tar archive",
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


def test_a_tar_that_shrinks_gives_bad_pictures(imagenet: Path, tmp_path: Path) -> None:
    layouts.pack_imagenet(imagenet, tmp_path / "packed")
    pictures = opened("imagenet", tmp_path / "packed").splits["test"]
    with (tmp_path / "packed/ILSVRC2012_img_val.tar").open("r+b") as file:
        file.truncate(700)
    with pytest.raises(BadPicture) as caught:
        pictures.picture(5, Decoder())
    assert caught.value.reason == "unreadable"
    assert caught.value.name.endswith("ILSVRC2012_img_val.tar/ILSVRC2012_val_00000006.JPEG")


# --- STL-10


@pytest.fixture
def stl10(tmp_path: Path, windows: list[np.ndarray]) -> Path:
    return layouts.write_stl10(tmp_path / "stl", [area_resize(square(one), 96) for one in windows], 22, 11)


def square(picture: np.ndarray) -> np.ndarray:
    side = min(picture.shape[:2])
    return picture[:side, :side]


def stl10_file(folder: Path, name: str) -> list[bytes]:
    """As the Python code on the data set's page reads it."""
    everything = np.fromfile(folder / f"{name}_X.bin", np.uint8)
    pictures = np.transpose(np.reshape(everything, (-1, 3, 96, 96)), (0, 3, 2, 1))
    return [picture.tobytes() for picture in pictures]


def stl10_split(folder: Path, name: str) -> Expected:
    names = (folder / "class_names.txt").read_text().split()
    labels = np.fromfile(folder / f"{name}_y.bin", np.uint8)
    return {picture: names[label - 1] for picture, label in zip(stl10_file(folder, name), labels, strict=True)}


@pytest.mark.parametrize("form", ["folder", "parent", "archive"])
@pytest.mark.parametrize("unlabelled", [False, True])
def test_stl10(stl10: Path, windows: list[np.ndarray], form: str, unlabelled: bool) -> None:
    path = {"folder": stl10, "parent": stl10.parent}.get(form) or archive_of(stl10)
    train, test = stl10_split(stl10, "train"), stl10_split(stl10, "test")
    if unlabelled:
        train |= dict.fromkeys(stl10_file(stl10, "unlabeled"))
    if form == "archive":
        shutil.rmtree(stl10)
    source = opened("stl10", path, unlabelled=unlabelled)
    assert source.classes == layouts.STL10_CLASSES
    assert {split: len(pictures) for split, pictures in source.splits.items()} == {
        "train": 29 if unlabelled else 22,
        "test": 11,
    }
    assert found(source, "train") == train
    assert found(source, "test") == test
    assert (source.splits["train"].picture(7, Decoder()) == area_resize(square(windows[7]), 96)).all()


def test_stl10_without_its_unlabelled_part_does_not_need_it(stl10: Path) -> None:
    before = opened("stl10", stl10).fingerprint
    (stl10 / "unlabeled_X.bin").unlink()
    assert opened("stl10", stl10).fingerprint == before


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train_X.bin", None, "lacks train_X.bin; it must be stl10_binary.tar.gz or its folder"),
        ("class_names.txt", None, "lacks class_names.txt"),
        ("unlabeled_X.bin", None, "lacks unlabeled_X.bin"),
        ("class_names.txt", lambda content: b"", "class_names.txt names no classes"),
        ("test_X.bin", lambda content: content[:-100], "test_X.bin has 304028 bytes, no multiple of 27648"),
        ("test_X.bin", lambda content: b"", "test_X.bin has 0 bytes"),
        ("test_y.bin", lambda content: content[:-1], "test_y.bin has 10 labels for 11 pictures"),
        ("train_y.bin", lambda content: b"\0" + content[1:], "train_y.bin has a label outside 1 to 10"),
        ("train_y.bin", lambda content: b"\x0b" + content[1:], "train_y.bin has a label outside 1 to 10"),
    ],
)
def test_mistakes_about_stl10_are_named(
    stl10: Path, name: str, change: Callable[[bytes], bytes] | None, message: str
) -> None:
    if change is None:
        (stl10 / name).unlink()
    else:
        (stl10 / name).write_bytes(change((stl10 / name).read_bytes()))
    for path in (stl10, archive_of(stl10)):
        with pytest.raises(ValueError, match=message):
            opened("stl10", path, unlabelled=True)


def test_a_damaged_archive_of_stl10_is_named(stl10: Path, tmp_path: Path) -> None:
    archive = archive_of(stl10)
    archive.write_bytes(archive.read_bytes()[:-20000])
    with pytest.raises(ValueError, match=r"stl10_binary.tar.gz is no readable tar archive"):
        opened("stl10", archive, unlabelled=True)
    with pytest.raises(ValueError, match="nowhere does not exist"):
        opened("stl10", tmp_path / "nowhere")


# --- COCO


@pytest.fixture
def coco(tmp_path: Path, windows: list[np.ndarray]) -> Path:
    layouts.write_coco(tmp_path / "coco", windows)
    return tmp_path / "coco"


def coco_split(root: Path, name: str) -> Expected:
    """A picture's largest object by a plain loop over the annotations."""
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
    monkeypatch.setattr("data_prep.sources.coco.CHUNK", 100)  # so that values lie across the pieces that are read
    layouts.write_coco(tmp_path, windows, year)
    source = opened("coco", tmp_path)
    assert source.name == f"COCO {year}"
    assert source.classes == ["person", "car", "dog", "chair", "toothbrush"]
    train, val = coco_split(tmp_path, f"train{year}"), coco_split(tmp_path, f"val{year}")
    assert sorted(map(str, train.values())) == ["None", "None", "car", "chair", "dog", "toothbrush"]
    assert found(source, "train") == train
    assert found(source, "test") == val
    assert "largest object" in source.facts["labels"]


def test_coco_without_validation_pictures_and_with_others(coco: Path, windows: list[np.ndarray]) -> None:
    expected = coco_split(coco, "train2017")
    shutil.rmtree(coco / "val2017")
    layouts.write(coco / "train2017/000000999999.jpg", layouts.jpeg(windows[30]))  # is not listed
    source = opened("coco", coco)
    assert list(source.splits) == ["train"]
    assert found(source, "train") == expected


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
        case "strange picture":
            whole["annotations"][0]["image_id"] = 8
            file.write_text(json.dumps(whole))
        case "pictures missing":
            (root / "train2017/000000000025.jpg").unlink()
            (root / "train2017/000000000036.jpg").unlink()
        case "other categories":
            whole["categories"][0]["name"] = "tooth brush"
            file.write_text(json.dumps(whole))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no train", r"coco holds no folder train2017 \(or train2014\)"),
        ("no annotations", "instances_train2017.json is missing; extract annotations_trainval2017.zip"),
        ("cut off", r"instances_train2017.json is not readable as JSON \(.* at character \d+\)"),
        ("garbage", r"instances_train2017.json is not readable as JSON \(.* at character \d+\)"),
        ("not an object", r"instances_train2017.json is not readable as JSON \('\[' in place of '{' at character 0\)"),
        ("no images", "instances_train2017.json lists no images"),
        ("captions", "instances_train2017.json has a annotations entry that is not COCO's .*iscrowd"),
        ("strange category", "has an annotation with category_id 91"),
        ("strange picture", "has an annotation with image_id 8"),
        ("pictures missing", "000000000025.jpg is missing, as are 1 others of the 6 pictures"),
        ("other categories", "instances_val2017.json has other categories"),
    ],
)
def test_mistakes_about_coco_are_named(coco: Path, how: str, message: str) -> None:
    damage_coco(coco, how)
    with pytest.raises(ValueError, match=message) as caught:
        opened("coco", coco)
    assert "\n" not in str(caught.value)


# --- Places205


@pytest.fixture
def places205(tmp_path: Path, windows: list[np.ndarray]) -> Path:
    layouts.write_places205(tmp_path / "places", windows)
    return tmp_path / "places"


def places_split(images: Path, file: Path) -> Expected:
    rows = [line.split(" ") for line in file.read_text().splitlines()]
    return {read(images / name): int(label) for name, label in rows}


@pytest.mark.parametrize("official", [True, False])
def test_places205(tmp_path: Path, windows: list[np.ndarray], official: bool) -> None:
    layouts.write_places205(tmp_path, windows, official)
    images = tmp_path / ("data/vision/torralba/deeplearning/images256" if official else "images256")
    lists = tmp_path / ("trainvalsplit_places205" if official else ".")
    source = opened("places205", tmp_path)
    assert source.classes == ["abbey", "airport_terminal", "apartment_building/outdoor", "yard"]
    numbers: list[Any] = list(range(4))
    for split, name, count in (("train", "train", 12), ("test", "val", 4)):
        expected = places_split(images, lists / f"{name}_places205.csv")
        assert found(source, split, numbers) == expected
        assert len(expected) == count
    first = (lists / "train_places205.csv").read_text().split()[0]
    assert source.splits["train"].picture(0, Decoder()).tobytes() == read(images / first)


def test_a_missing_picture_of_places205_is_a_bad_picture(places205: Path) -> None:
    source = opened("places205", places205)
    name = (places205 / "trainvalsplit_places205/train_places205.csv").read_text().split()[4]
    next(places205.rglob(Path(name).name)).unlink()
    with pytest.raises(BadPicture) as caught:
        source.splits["train"].picture(2, Decoder())
    assert caught.value.reason == "unreadable"
    assert caught.value.name.endswith(name)


Change = Callable[[str], str]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train", lambda text: "", "train_places205.csv lists no pictures"),
        ("val", lambda text: "\n", "val_places205.csv lists no pictures"),
        ("train", lambda text: text.replace(" 2", " two"), r"has the line 'a/apartment.* two'; a line must be like"),
        ("train", lambda text: text.replace(" 2", " -1"), r"has the line 'a/apartment.* -1'"),
        ("train", lambda text: text.replace(" 1\n", " 4\n"), "has no picture of class 1"),
        ("val", lambda text: text.replace(" 1\n", " 204\n"), "val_places205.csv has class 204, which the training"),
        ("train", lambda text: text.replace(" 1\n", " 0\n", 1), "puts class 0 into a/a.*; it must be one folder"),
        ("both", lambda text: text.replace("y/yard", "a/abbey"), "a/abbey/ is class . and class .; a class has"),
        ("train", lambda text: text.replace("yard", "yurt"), "puts class 3 into y/yard/ and y/yurt/"),
    ],
)
def test_mistakes_in_the_lists_of_places205_are_named(places205: Path, name: str, change: Change, message: str) -> None:
    for one in ("train", "val") if name == "both" else (name,):
        file = places205 / f"trainvalsplit_places205/{one}_places205.csv"
        file.write_text(change(file.read_text()))
    with pytest.raises(ValueError, match=message):
        opened("places205", places205)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("data", "places holds no data/vision/torralba/deeplearning/images256; extract imagesPlaces205_resize.tar.gz"),
        ("trainvalsplit_places205/val_places205.csv", "val_places205.csv is missing; extract trainvalsplit_places205"),
        ("data/vision/torralba/deeplearning/images256/y", "images256/y/yard is missing"),
    ],
)
def test_missing_parts_of_places205_are_named(places205: Path, gone: str, message: str) -> None:
    (places205 / gone).rename(places205 / "elsewhere")
    with pytest.raises(ValueError, match=message):
        opened("places205", places205)


# --- prepared by the command


def check_shards(out: Path, splits: dict[str, Expected], classes: list[str]) -> None:
    """Every picture is in the set once, with its class, in the split it belongs to (valid is taken off train).

    splits: the pixels of each official split's pictures, cut and reduced, to their labels. Colours are those of
    the palette that are nearest, which tells the pictures apart.
    """
    shard_set = open_shard_set(out)
    assert shard_set.classes == classes
    palette = 127.5 * (shard_set.palette.astype(float) + 1)
    stored: dict[str, list[tuple[int, ...]]] = {"train": [], "test": []}
    for name in shard_set.splits:
        tokens, labels = shard_set.split(name).gather(np.arange(shard_set.split(name).images))
        rows = zip(labels.tolist(), tokens.tolist(), strict=True)
        stored["test" if name == "test" else "train"] += [(label, *row) for label, row in rows]
    for name, expected in splits.items():
        wanted = []
        for content, label in expected.items():
            pixels = np.frombuffer(content, np.uint8).reshape(-1, 1, 3).astype(float)
            wanted.append((label, *((pixels - palette) ** 2).sum(-1).argmin(-1).tolist()))
        assert sorted(stored[name]) == sorted(wanted)


def reduced(picture: np.ndarray) -> bytes:
    """The largest centred square, at 8x8."""
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return area_resize(picture[top : top + side, left : left + side], 8).tobytes()


@pytest.fixture
def prepare(tmp_path: Path, run: Callable[..., Any]) -> Callable[..., Path]:
    """Prepares a source whole, uncropped, at 8x8 through the command."""

    def prepared(kind: str, path: Path, *more: str) -> Path:
        out = tmp_path / f"shards-{path.name}"
        options = ("--resolution", "8", "--palette.colors", "64", "--workers", "2", "--views.random_crop", "never")
        result = run(
            *("shards", "--config", CONFIGS / f"{kind}.yaml", "--source.path", path),
            *(*options, "--out", out, *more),
        )
        assert result.code == 0, result.err
        return out

    return prepared


def opened_jpeg(content: bytes | Path) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content) if isinstance(content, bytes) else content).convert("RGB"))


def test_imagenet_prepared_from_folders_and_from_tars(
    imagenet: Path, tmp_path: Path, prepare: Callable[..., Path]
) -> None:
    layouts.pack_imagenet(imagenet, tmp_path / "packed")
    train = {reduced(opened_jpeg(file)): WNIDS.index(file.parent.name) for file in imagenet.glob("train/*/*.JPEG")}
    truth = imagenet_truth(imagenet / layouts.DEVKIT)
    pictures = sorted(imagenet.glob("val/*.JPEG"))
    test = {reduced(opened_jpeg(file)): WNIDS.index(wnid) for file, wnid in zip(pictures, truth, strict=True)}
    shards = [prepare("imagenet", path, "--valid_fraction", "0.2") for path in (imagenet, tmp_path / "packed")]
    for out in shards:
        check_shards(out, {"train": train, "test": test}, words_of_meta(imagenet / layouts.DEVKIT))
        manifest = open_shard_set(out).manifest
        assert manifest["source"]["wnids"] == WNIDS
        assert manifest["splits"]["valid"]["images"] == 3
    folders, tars = ([file.read_bytes() for file in sorted(out.glob("*.tar"))] for out in shards)
    assert folders == tars


def test_stl10_prepared(stl10: Path, prepare: Callable[..., Path]) -> None:
    splits: dict[str, Expected] = {}
    for name in ("train", "test"):
        labels = np.fromfile(stl10 / f"{name}_y.bin", np.uint8).astype(int) - 1
        pictures = [np.frombuffer(one, np.uint8).reshape(96, 96, 3) for one in stl10_file(stl10, name)]
        splits[name] = dict(zip(map(reduced, pictures), labels.tolist(), strict=True))
    archive = archive_of(stl10)
    check_shards(prepare("stl10", archive), splits, layouts.STL10_CLASSES)
    unlabelled = [np.frombuffer(one, np.uint8).reshape(96, 96, 3) for one in stl10_file(stl10, "unlabeled")]
    splits["train"] |= {reduced(one): -1 for one in unlabelled}
    check_shards(prepare("stl10", stl10, "--source.unlabelled", "true"), splits, layouts.STL10_CLASSES)


def test_coco_prepared(coco: Path, prepare: Callable[..., Path]) -> None:
    classes = ["person", "car", "dog", "chair", "toothbrush"]
    splits: dict[str, Expected] = {}
    for split, name in (("train", "train2017"), ("test", "val2017")):
        label_of = {
            pixels: -1 if category is None else classes.index(category)
            for pixels, category in coco_split(coco, name).items()
        }
        pictures = [opened_jpeg(file) for file in (coco / name).iterdir()]
        splits[split] = {reduced(one): label_of[one.tobytes()] for one in pictures}
    out = prepare("coco", coco)
    check_shards(out, splits, classes)
    assert "largest object" in open_shard_set(out).manifest["source"]["labels"]


def test_places205_prepared(places205: Path, prepare: Callable[..., Path]) -> None:
    images = places205 / "data/vision/torralba/deeplearning/images256"
    splits: dict[str, Expected] = {}
    for split, name in (("train", "train"), ("test", "val")):
        rows = (places205 / f"trainvalsplit_places205/{name}_places205.csv").read_text().splitlines()
        pairs = [row.split(" ") for row in rows]
        splits[split] = {reduced(opened_jpeg(images / picture)): int(label) for picture, label in pairs}
    classes = ["abbey", "airport_terminal", "apartment_building/outdoor", "yard"]
    check_shards(prepare("places205", places205), splits, classes)


@pytest.mark.parametrize(("kind", "version"), [("cifar10", "python"), ("cifar100", "binary")])
def test_cifar_prepared(
    kind: str,
    version: str,
    write_cifar: Callable[[str, str], Path],
    small: tuple[np.ndarray, np.ndarray],
    prepare: Callable[..., Path],
) -> None:
    cells = dict(zip(map(reduced, small[0]), small[1].tolist(), strict=True))
    assert len(cells) == 60
    splits: dict[str, Expected] = {"train": dict(list(cells.items())[:50]), "test": dict(list(cells.items())[50:])}
    classes = [f"class{number}" for number in range(int(kind.removeprefix("cifar")))]
    out = prepare(kind, archive_of(write_cifar(kind, version)), "--valid_fraction", "0.2")
    check_shards(out, splits, classes)
    images = {name: open_shard_set(out).split(name).images for name in ("train", "valid", "test")}
    assert images == {"train": 40, "valid": 10, "test": 10}


def test_hugging_face_prepared(
    tmp_path: Path, small: tuple[np.ndarray, np.ndarray], prepare: Callable[..., Path]
) -> None:
    datasets = pytest.importorskip("datasets")
    names, splits, tables = ["astronaut", "cat", "coffee"], {}, {}
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    for name, part in (("train", slice(0, 40)), ("validation", slice(40, 50)), ("test", slice(50, 60))):
        columns = {"img": list(map(Image.fromarray, small[0][part])), "label": small[1][part].tolist()}
        tables[name] = datasets.Dataset.from_dict(columns, features=features)
        splits[name] = dict(zip(map(reduced, small[0][part]), columns["label"], strict=True))
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "saved")
    out = prepare("hf_dataset", tmp_path / "saved")
    check_shards(out, {"train": splits["train"] | splits["validation"], "test": splits["test"]}, names)
    assert open_shard_set(out).split("valid").images == 10


# --- memory


def opened_with_peak(kind: str, path: Path) -> tuple[Source, int, int]:
    """The source, and the bytes that opening it took: kept, and at most."""
    tracemalloc.start()
    try:
        source = opened(kind, path)
        return source, *tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()


def test_a_long_list_takes_little_memory(places205: Path) -> None:
    """A string for each name would keep 49 bytes more than its characters, and 8 for its place in a list."""
    pictures = 200_000
    lines = [f"{layouts.PLACES[n % 4]}/gsun_{n:032x}.jpg {n % 4}\n" for n in range(pictures)]
    (places205 / "trainvalsplit_places205/train_places205.csv").write_text("".join(lines))
    characters = sum(map(len, lines)) - 3 * pictures
    del lines
    source, kept, peak = opened_with_peak("places205", places205)
    assert len(source.splits["train"]) == pictures
    assert kept < characters + 16 * pictures + 1e6
    assert peak < 2 * characters + 64 * pictures + 1e6


def test_large_annotations_take_little_memory(coco: Path) -> None:
    """The outlines are most of the file, and are let go one by one."""
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
