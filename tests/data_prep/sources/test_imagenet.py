"""ImageNet in miniature, in each form in which it is distributed; labels are compared with the files written."""

import csv
import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from data_prep.config import SourceConfig
from data_prep.images.decode import Decoder
from data_prep.shards.reader import open_shard_set
from data_prep.sources.base import Source
from data_prep.sources.open import open_source
from data_prep.sources.tar_index import open_random_access, tar_members

# In ILSVRC2012_ID order, which is not the order of the wnids; two classes share a name.
SYNSETS = [("n03126707", "crane"), ("n01440764", "tench, Tinca tinca"), ("n02012849", "crane")]
WNIDS = sorted(wnid for wnid, _ in SYNSETS)
TRUTH = [1, 3, 2, 2, 1, 3]
"""ILSVRC2012_ID of each validation image."""

Small = tuple[np.ndarray, np.ndarray]


def jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@pytest.fixture
def train(small: Small) -> dict[str, bytes]:
    """{wnid/name: JPEG}: 4 images a class."""
    return {
        f"{wnid}/{wnid}_{n}.JPEG": jpeg(small[0][4 * c + n]) for c, (wnid, _) in enumerate(SYNSETS) for n in range(4)
    }


@pytest.fixture
def val(small: Small) -> dict[str, bytes]:
    """{official name: JPEG}: 6 images."""
    return {f"ILSVRC2012_val_{n:08d}.JPEG": jpeg(small[0][30 + n]) for n in range(1, 7)}


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            add(tar, name, content)
    return buffer.getvalue()


def write_files(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def write_devkit(root: Path) -> None:
    """meta.mat with the classes, then an inner node of the hierarchy, as in the official file."""
    data = root / "ILSVRC2012_devkit_t12/data"
    data.mkdir(parents=True)
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    kinds += [("children", "O"), ("wordnet_height", "O"), ("num_train_images", "O")]
    rows = [(n, wnid, words, "a gloss", 0, [], 0, 4) for n, (wnid, words) in enumerate(SYNSETS, 1)]
    rows.append((len(rows) + 1, "n00001740", "entity", "a gloss", 3, [1, 2, 3], 19, 0))
    synsets = np.empty((len(rows), 1), dtype=kinds)
    for place, row in enumerate(rows):
        synsets[place, 0] = row
    savemat(data / "meta.mat", {"synsets": synsets})
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{number}\n" for number in TRUTH))


def write_kaggle(root: Path) -> None:
    with (root / "LOC_val_solution.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["ImageId", "PredictionString"])
        for place in (4, 2, 6, 1, 3, 5):  # the official file is in no order
            wnid = SYNSETS[TRUTH[place - 1] - 1][0]
            rows.writerow([f"ILSVRC2012_val_{place:08d}", f"{wnid} 1 2 30 40 {wnid} 5 5 9 9 "])
    lines = (f"{wnid} {words}" for wnid, words in sorted(SYNSETS))
    (root / "LOC_synset_mapping.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture(params=["extracted", "tars", "devkit archive", "kaggle", "val in class folders"])
def root(request: pytest.FixtureRequest, tmp_path: Path, train: dict[str, bytes], val: dict[str, bytes]) -> Path:
    root = tmp_path / "imagenet"
    root.mkdir()
    if request.param == "tars":
        inner = {
            f"{wnid}.tar": tar_of({name.partition("/")[2]: data for name, data in train.items() if wnid in name})
            for wnid, _ in SYNSETS
        }
        (root / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner))
        (root / "ILSVRC2012_img_val.tar").write_bytes(tar_of(dict(reversed(val.items()))))
    elif request.param == "kaggle":
        write_files(root / "ILSVRC/Data/CLS-LOC/train", train)
        write_files(root / "ILSVRC/Data/CLS-LOC/val", val)
        write_kaggle(root)
        return root
    else:
        write_files(root / "train", train)
        folders = {name: SYNSETS[number - 1][0] + "/" for name, number in zip(val, TRUTH, strict=True)}
        in_folders = request.param == "val in class folders"
        write_files(root / "val", {folders[n] + n if in_folders else n: data for n, data in val.items()})
    write_devkit(root)
    if request.param == "devkit archive":
        with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
            tar.add(root / "ILSVRC2012_devkit_t12", "ILSVRC2012_devkit_t12")
        shutil.rmtree(root / "ILSVRC2012_devkit_t12")
    return root


def opened(root: Path) -> Source:
    return open_source(SourceConfig(kind="imagenet", path=str(root)))


def labelled(source: Source, split: str) -> set[tuple[bytes, str]]:
    """(pixels, wnid) of every image."""
    found = source.splits[split]
    wnids = source.facts["wnids"]
    return {(found.image(n, Decoder()).tobytes(), wnids[found.labels[n]]) for n in range(len(found))}


def pixels(content: bytes) -> bytes:
    return np.asarray(Image.open(io.BytesIO(content))).tobytes()


def test_every_form_has_the_same_images(root: Path, train: dict[str, bytes], val: dict[str, bytes]) -> None:
    source = opened(root)
    assert source.facts["wnids"] == WNIDS
    assert source.classes == ["tench, Tinca tinca", "crane", "crane"]
    assert len(source.splits["train"]) == 12
    assert len(source.splits["test"]) == 6
    assert labelled(source, "train") == {(pixels(data), name.partition("/")[0]) for name, data in train.items()}
    truth = zip(val.values(), TRUTH, strict=True)
    assert labelled(source, "test") == {(pixels(data), SYNSETS[number - 1][0]) for data, number in truth}


def test_it_becomes_a_shard_set(root: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    options = ["--source.kind", "imagenet", "--source.path", root, "--resolution", 8, "--palette.colors", 16]
    result = run("shards", *options, "--valid_fraction", 0.25, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    shard_set = open_shard_set(tmp_path / "out")
    assert {name: shard_set.split(name).images for name in shard_set.splits} == {"train": 9, "valid": 3, "test": 6}
    assert sorted(shard_set.split("test").record(0)[1]) == [0, 0, 1, 1, 2, 2]
    assert shard_set.manifest["source"]["wnids"] == WNIDS


@pytest.mark.parametrize("root", ["extracted"], indirect=True)
def test_errors_are_named(root: Path) -> None:
    truth = root / "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
    whole = truth.read_text()
    truth.write_text(whole + "1\n")
    with pytest.raises(ValueError, match=r"val has 6 images, but .*has classes for 7"):
        opened(root)
    truth.write_text(whole.replace("3", "4"))  # the inner node is no class
    with pytest.raises(ValueError, match="has '4' in line 2; it must be an ILSVRC2012_ID"):
        opened(root)
    truth.unlink()
    with pytest.raises(ValueError, match="ILSVRC2012_validation_ground_truth"):
        opened(root)
    truth.write_text(whole)
    shutil.rmtree(root / "train")
    with pytest.raises(ValueError, match=r"neither the folder train/ nor ILSVRC2012_img_train\.tar"):
        opened(root)


@pytest.mark.parametrize("root", ["tars"], indirect=True)
def test_a_truncated_tar_is_named(root: Path) -> None:
    tar = root / "ILSVRC2012_img_train.tar"
    tar.write_bytes(tar.read_bytes()[:-12_000])
    with pytest.raises(ValueError, match=r"ILSVRC2012_img_train\.tar.* is truncated"):
        opened(root)


def test_a_member_of_negative_size_is_damage(tmp_path: Path) -> None:
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 10 + b"\xfe\x00"  # -512 in base 256: the next header would be this one again
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "bad.tar").write_bytes(header + bytes(1024))
    with pytest.raises(ValueError, match=r"bad\.tar is damaged at byte 0 \(size -512\)"):
        list(tar_members(open_random_access(tmp_path / "bad.tar")))
