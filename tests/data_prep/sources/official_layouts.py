"""Miniatures of ImageNet, STL-10, COCO and Places205 in their true layouts, from windows of photographs.

The writers take uint8 (H, W, 3) images, all different, and say nothing of what they wrote: the tests read the
layouts' own files again.
"""

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Images = Sequence[np.ndarray]

SYNSETS = {  # wnid: ILSVRC2012_ID, words; two classes called "crane", numbers in another order than the wnids
    "n01440764": (5, "tench, Tinca tinca"),
    "n02012849": (4, "crane"),
    "n02119789": (1, "kit fox, Vulpes macrotis"),
    "n03126707": (2, "crane"),
    "n03710637": (3, "maillot"),
}
INNER_SYNSETS = {"n02083346": (1001, "canine, canid"), "n00001740": (1860, "entity")}
STL10_CLASSES = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
DEVKIT = "ILSVRC2012_devkit_t12"


def jpeg(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=92)
    return file.getvalue()


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def tar_of(folder: Path, tar: Path, arcname: str = ".", mode: str = "w") -> Path:
    """The files in `folder`, in an order that is not that of their names; flat below `arcname`."""
    with tarfile.open(tar, mode) as archive:  # type: ignore[call-overload]
        for file in sorted(folder.iterdir(), key=lambda file: file.name[::-1]):
            archive.add(file, f"{arcname}/{file.name}" if arcname != "." else file.name)
    return tar


# --- ImageNet


def write_imagenet(root: Path, images: Images) -> None:
    """train/, val/ and the devkit: 3, 4, 3, 4, 3 training images of the classes, and 8 for validation."""
    remaining = iter(images)
    for number, wnid in enumerate(SYNSETS):
        for image in range(3 + number % 2):
            write(root / f"train/{wnid}/{wnid}_{[10026, 9, 371, 20000][image]}.JPEG", jpeg(next(remaining)))
    (root / "train/n01440764/n01440764_9.JPEG").write_bytes(png(next(remaining)))  # as n02105855_2933.JPEG is
    for number in range(1, 9):
        write(root / f"val/ILSVRC2012_val_{number:08d}.JPEG", jpeg(next(remaining)))
    write_devkit(root, [5, 2, 2, 3, 1, 4, 1, 5])


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def write_devkit(root: Path, truth: Sequence[int]) -> None:
    from scipy.io import savemat

    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height"]
    synsets = np.empty((len(SYNSETS) + len(INNER_SYNSETS), 1), [(f, object) for f in [*fields, "num_train_images"]])
    rows = sorted([*SYNSETS.items(), *INNER_SYNSETS.items()], key=lambda row: row[1][0])
    for place, (wnid, (number, words)) in enumerate(rows):
        children = np.array([1.0, 1001.0]) if wnid in INNER_SYNSETS else np.empty(0)
        gloss, images = f"what {words} is", 3.0
        values = [float(number), wnid, words, gloss, float(len(children)), children, float(len(children) > 0), images]
        synsets[place, 0] = tuple(values)
    (root / DEVKIT / "data").mkdir(parents=True)
    savemat(root / DEVKIT / "data/meta.mat", {"synsets": synsets})
    (root / DEVKIT / "readme.txt").write_text("ILSVRC2012 development kit")
    lines = "".join(f"{number}\n" for number in truth)
    (root / DEVKIT / "data/ILSVRC2012_validation_ground_truth.txt").write_text(lines)


def pack_imagenet(root: Path, out: Path) -> None:
    """The same as the downloaded archives: two tars and the devkit's .tar.gz."""
    out.mkdir()
    classes = out / "classes"
    classes.mkdir()
    for folder in (root / "train").iterdir():
        tar_of(folder, classes / f"{folder.name}.tar")
    tar_of(classes, out / "ILSVRC2012_img_train.tar")
    tar_of(root / "val", out / "ILSVRC2012_img_val.tar")
    with tarfile.open(out / f"{DEVKIT}.tar.gz", "w:gz") as archive:
        archive.add(root / DEVKIT, DEVKIT)
    for file in classes.iterdir():
        file.unlink()
    classes.rmdir()


def to_kaggle(root: Path) -> None:
    """Moves the images to where Kaggle has them, and replaces the devkit by Kaggle's two lists."""
    wnid_of = {number: wnid for wnid, (number, _) in SYNSETS.items()}
    truth = (root / DEVKIT / "data/ILSVRC2012_validation_ground_truth.txt").read_text().split()
    rows = [f"ILSVRC2012_val_{n:08d},{wnid_of[int(word)]} 85 1 499 272 " for n, word in enumerate(truth, 1)]
    rows[0] += f"{wnid_of[int(truth[0])]} 131 0 499 254 "  # two objects of the class
    (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows[::-1]]) + "\n")
    words = "".join(f"{wnid} {words}\n" for wnid, (_, words) in SYNSETS.items())
    (root / "LOC_synset_mapping.txt").write_text(words)
    (root / "ILSVRC/Data/CLS-LOC").mkdir(parents=True)
    for name in ("train", "val"):
        (root / name).rename(root / "ILSVRC/Data/CLS-LOC" / name)
    (root / DEVKIT).rename(root.with_name("devkit-elsewhere"))


# --- STL-10


def write_stl10(root: Path, images: Images, train: int, test: int) -> Path:
    """Images (96, 96, 3): `train` and `test` labelled ones, the rest unlabelled. Returns stl10_binary/."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    stacked = np.stack(images).transpose(0, 3, 2, 1)  # color, x, y
    parts = {"train": stacked[:train], "test": stacked[train : train + test], "unlabeled": stacked[train + test :]}
    for name, part in parts.items():
        (folder / f"{name}_X.bin").write_bytes(part.tobytes())
    for name, step in (("train", 3), ("test", 7)):
        labels = np.arange(len(parts[name])) * step % 10 + 1
        (folder / f"{name}_y.bin").write_bytes(labels.astype(np.uint8).tobytes())
    (folder / "class_names.txt").write_text("\n".join(STL10_CLASSES) + "\n")
    (folder / "fold_indices.txt").write_text(" ".join(map(str, range(train))) + "\n")
    return folder


# --- COCO

COCO_CATEGORIES = {1: "person", 3: "car", 18: "dog", 62: "chair", 90: "toothbrush"}


def write_coco(root: Path, source: Images, year: str = "2017") -> None:
    """Six training and four validation images, among them all that is special about their objects."""
    polygon = [[round(0.37 * n, 2) for n in range(40)]]
    objects: dict[int, list[dict[str, Any]]] = {
        9: [{"area": 120.5, "category_id": 1}, {"area": 4000.25, "category_id": 18}],
        25: [{"area": 77.0, "category_id": 90, "id": 900}, {"area": 77.0, "category_id": 3, "id": 800}],  # a tie
        30: [{"area": 5.0, "category_id": 62}, {"area": 90000.0, "category_id": 1, "iscrowd": 1}],
        34: [{"area": 90000.0, "category_id": 1, "iscrowd": 1}],  # nothing but a crowd
        36: [],
        581921: [{"area": 1.5, "category_id": 90}],
        139: [{"area": 10.0, "category_id": 62}, {"area": 11.0, "category_id": 3}],
        285: [{"area": 3.0, "category_id": 18}],
        632: [],
        724: [{"area": 3.0, "category_id": 1}, {"area": 2.0, "category_id": 90}],
    }
    remaining = iter(source)
    for split, numbers in (("train", [*objects][:6]), ("val", [*objects][6:])):
        images, annotations = [], []
        for number in numbers[::-1]:
            name = f"{number:012d}.jpg" if year == "2017" else f"COCO_{split}{year}_{number:012d}.jpg"
            image = next(remaining)
            write(root / f"{split}{year}/{name}", jpeg(image))
            height, width = image.shape[:2]
            images.append({"license": 4, "file_name": name, "height": height, "width": width, "id": number})
            for place, one in enumerate(objects[number]):
                crowd = {"segmentation": {"counts": [7, 20, 3], "size": [height, width]}, "iscrowd": 1}
                alone = {"segmentation": polygon, "iscrowd": 0}
                common = {"image_id": number, "bbox": [1.0, 2.5, 3.0, 4.0], "id": 10 * number + place}
                annotations.append((crowd if one.get("iscrowd") else alone) | common | one)
        write(root / f"annotations/instances_{split}{year}.json", coco_json(images, annotations))


def coco_json(images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> bytes:
    categories = [{"supercategory": "x", "id": number, "name": name} for number, name in COCO_CATEGORIES.items()]
    whole = {
        "info": {"description": "COCO 2017 Dataset", "year": 2017, "url": 'a "quoted" \\ [name]'},
        "licenses": [{"url": "http://creativecommons.org/", "id": 4, "name": "Attribution Licénse"}],
        "images": images,
        "annotations": annotations,
        "categories": categories[::-1],
    }
    return json.dumps(whole, ensure_ascii=False).encode()


# --- Places205

PLACES = {0: "a/abbey", 1: "a/airport_terminal", 2: "a/apartment_building/outdoor", 3: "y/yard"}


def write_places205(root: Path, source: Images, official: bool = True) -> None:
    """Twelve training and four validation images, listed in no order; `official`: in the archives' folders."""
    images = root / ("data/vision/torralba/deeplearning/images256" if official else "images256")
    lists = root / ("trainvalsplit_places205" if official else ".")
    lists.mkdir(parents=True, exist_ok=True)
    remaining: Iterator[tuple[int, np.ndarray]] = iter(enumerate(source))
    for split, count in (("train", 12), ("val", 4)):
        lines = []
        for _ in range(count):
            number, image = next(remaining)
            label = (3 * number + 2) % len(PLACES)
            name = f"{PLACES[label]}/gsun_{number * 0x9E3779B97F4A7C15 % (1 << 64):032x}.jpg"
            write(images / name, jpeg(image))
            lines.append(f"{name} {label}\n")
        (lists / f"{split}_places205.csv").write_text("".join(lines))
