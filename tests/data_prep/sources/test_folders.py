"""Image folders as people have them: system folders, other endings, links, and copies that are not complete."""

import io
import logging
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.sources.folders import MAX_LEVELS
from tests.data_prep.small_data import CLASSES
from tests.data_prep.sources import official_layouts as layouts
from tests.data_prep.sources.reading import opened
from tests.data_prep.time_limit import time_limit

THUMBNAIL = Path("0001.jpg/SYNOFILE_THUMB_XL.jpg")


def image(kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, kind)
    return buffer.getvalue()


def write(path: Path, content: bytes | None = None) -> None:
    layouts.write(path, image() if content is None else content)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """train/cat and train/dog with two images each, and test/cat with one."""
    for name in ("train/cat/0.png", "train/cat/1.png", "train/dog/0.png", "train/dog/1.png", "test/cat/0.png"):
        write(tmp_path / "pictures" / name)
    return tmp_path / "pictures"


def names(root: Path, split: str = "train") -> list[str]:
    return list(opened("image_folder", root).splits[split].names)  # type: ignore[attr-defined]


USUAL = ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"]


# --- what is ignored


@pytest.mark.parametrize(
    "system", ["@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information", ".ipynb_checkpoints"]
)
@pytest.mark.parametrize("parent", ["train", "train/cat", "test"])
def test_system_folders_are_passed_over_and_counted(
    system: str, parent: str, pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(pictures / parent / system / THUMBNAIL)
    with caplog.at_level(logging.INFO):
        source = opened("image_folder", pictures)
    assert source.classes == ["cat", "dog"]
    assert {split: len(images) for split, images in source.splits.items()} == {"train": 4, "test": 1}
    assert f"{pictures / parent.partition('/')[0]}: ignored system folders: 1 ({system})" in caplog.text


def test_system_folders_in_tars_are_ignored(tmp_path: Path) -> None:
    """Made of folders on a file server; also in ImageNet's tars of classes."""
    for name in ("n01440764/a.JPEG", "n01440764/b.JPEG", f"n01440764/@eaDir/{THUMBNAIL}"):
        write(tmp_path / "classes" / name, image("JPEG"))
    inner = layouts.tar_of(tmp_path / "classes/n01440764", tmp_path / "n01440764.tar")
    (tmp_path / "outer").mkdir()
    with tarfile.open(tmp_path / "outer/ILSVRC2012_img_train.tar", "w") as tar:
        tar.add(inner, inner.name)
    images = opened("imagenet", tmp_path / "outer").splits["train"]
    assert list(images.names) == ["n01440764/a.JPEG", "n01440764/b.JPEG"]  # type: ignore[attr-defined]
    (stream,) = opened("webdataset", inner).streams["train"]
    assert sorted(item.name.partition(" ")[0] for item in stream) == ["a.JPEG", "b.JPEG"]


def test_what_is_not_an_image_is_counted(pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("cat/Thumbs.db", "cat/a.txt", "dog/b.TXT", "readme.md", "dog/clip.heic", "dog/notes"):
        write(pictures / "train" / name, b"x")
    write(pictures / "train/cat/._0.png", b"\0\5\x16\7")
    with caplog.at_level(logging.INFO):
        assert names(pictures) == USUAL
    assert (
        f"{pictures}/train: ignored hidden files: 1; files that are not images: 6 (2 .txt, 1 .md, 1 .db and 2 more)"
        f", the first is readme.md"
    ) in caplog.messages


def test_a_class_without_images_is_named(pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(pictures / "train/bird/a.heic", b"x")
    assert opened("image_folder", pictures).classes == ["bird", "cat", "dog"]
    assert (
        f"{pictures}/train has no images in 1 of its class folders, which are classes all the same: bird" in caplog.text
    )


def test_a_set_without_images_names_what_it_has(pictures: Path) -> None:
    for path in (pictures / "train").glob("*/*.png"):
        path.rename(path.with_suffix(".heic"))
        path.with_suffix(".heic").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"train has no images; .*ignored files that are not images: 4 \(4 .heic\)"):
        names(pictures)


# --- formats


@pytest.mark.parametrize(
    ("ending", "kind"),
    [
        (".jfif", "JPEG"),
        (".jpe", "JPEG"),
        (".avif", "AVIF"),
        (".jp2", "JPEG2000"),
        (".J2K", "JPEG2000"),
        (".ico", "ICO"),
    ],
)
def test_every_ending_of_a_format_that_is_decoded_is_read(ending: str, kind: str, pictures: Path) -> None:
    write(pictures / f"train/cat/a{ending}", image(kind))
    assert names(pictures) == [*USUAL[:2], f"cat/a{ending}", *USUAL[2:]]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "AVIF", "JPEG2000"])
@pytest.mark.parametrize("name", ["a", "a.jpg_large", "a.JPG.crdownload"])
def test_an_image_with_another_ending_is_read(kind: str, name: str, pictures: Path) -> None:
    write(pictures / "train/cat" / name, image(kind))
    assert f"cat/{name}" in names(pictures)


def test_imagenet_takes_every_ending(tmp_path: Path, windows: list[np.ndarray]) -> None:
    """Folders and tars alike; a class with two endings has all its images."""
    layouts.write_imagenet(tmp_path / "imagenet", windows)
    whole = opened("imagenet", tmp_path / "imagenet")
    for number, path in enumerate(sorted((tmp_path / "imagenet").glob("train/*/*.JPEG"))):
        if number % 2:
            path.rename(path.with_suffix([".jpg", ".png", ".webp"][number % 3]))
    layouts.pack_imagenet(tmp_path / "imagenet", tmp_path / "packed")
    for root in ("imagenet", "packed"):
        assert (opened("imagenet", tmp_path / root).splits["train"].labels == whole.splits["train"].labels).all()


# --- links


def test_each_real_folder_is_read_once_a_class(tmp_path: Path) -> None:
    classes = [f"class{number}" for number in range(8)]
    for name in classes:
        write(tmp_path / "train" / name / "0.png")
        for other in classes:
            if other != name:
                (tmp_path / "train" / name / f"see_{other}").symlink_to(f"../{other}")
    with time_limit(10):
        found = names(tmp_path)
    assert len(found) == 64
    assert found[:2] == ["class0/0.png", "class0/see_class1/0.png"]


def test_a_folder_is_read_at_its_own_place_rather_than_through_a_link(pictures: Path) -> None:
    write(pictures / "train/cat/z/a.png")
    (pictures / "train/cat/b").symlink_to("z")
    (pictures / "train/cat/z/up").symlink_to("../../..")
    (pictures / "train/cat/z/round").symlink_to("..")
    assert names(pictures) == [*USUAL[:2], "cat/z/a.png", *USUAL[2:]]


def test_a_limit_of_folders_within_each_other(pictures: Path) -> None:
    write(pictures / "train/cat" / "/".join(["d"] * MAX_LEVELS) / "a.png")
    assert len(names(pictures)) == 5
    (pictures / "train/cat" / "/".join(["d"] * MAX_LEVELS) / "d").mkdir()
    with pytest.raises(ValueError, match=rf"train/cat/d/d/.*has more than {MAX_LEVELS} folders within each other"):
        names(pictures)


# --- half-finished layouts


def test_images_beside_class_folders_are_refused(pictures: Path) -> None:
    for number in range(5):
        write(pictures / f"test/{number}.png")
    message = r"test has images outside its class folders: 5 \(0.png, 1.png, 2.png and 2 more\)"
    with pytest.raises(ValueError, match=message):
        names(pictures)


@pytest.mark.parametrize("archive", ["bird.tar", "bird.tar.gz", "bird.zip"])
def test_a_class_that_is_not_extracted_is_refused(archive: str, pictures: Path) -> None:
    write(pictures / "train" / archive, b"x")
    with pytest.raises(ValueError, match=rf"train has archives that are not extracted: 1 \({archive}\)"):
        names(pictures)
    (pictures / "train" / archive).rename(pictures / "train" / archive.replace("bird", "cat"))
    write(pictures / "train/train.zip", b"x")
    assert names(pictures) == USUAL


def test_a_split_that_is_not_extracted_is_refused(pictures: Path) -> None:
    write(pictures / "val.tar.gz", b"x")
    write(pictures / "train.zip", b"x")
    with pytest.raises(ValueError, match=r"has val.tar.gz, but no folder valid/; extract it, or remove it"):
        names(pictures)


def test_a_split_may_have_one_folder_in_any_case(pictures: Path) -> None:
    (pictures / "train").rename(pictures / "Train")
    write(pictures / "Val/cat/0.png")
    assert {split: len(found) for split, found in opened("image_folder", pictures).splits.items()} == {
        "train": 4,
        "valid": 1,
        "test": 1,
    }
    (pictures / "validation").mkdir()
    with pytest.raises(ValueError, match="has Val/ and validation/ for the split valid; rename or remove all but one"):
        names(pictures)


@pytest.fixture
def imagenet(tmp_path: Path, windows: list[np.ndarray]) -> Path:
    layouts.write_imagenet(tmp_path / "imagenet", windows)
    return tmp_path / "imagenet"


def test_a_validation_set_of_imagenet_that_is_half_sorted_is_refused(imagenet: Path) -> None:
    truth = [5, 2, 2, 3, 1, 4, 1, 5]
    wnids = {number: wnid for wnid, (number, _) in layouts.SYNSETS.items()}
    for number in range(1, 6):
        name = f"ILSVRC2012_val_{number:08d}.JPEG"
        (imagenet / "val" / wnids[truth[number - 1]]).mkdir(exist_ok=True)
        (imagenet / "val" / name).rename(imagenet / "val" / wnids[truth[number - 1]] / name)
    with pytest.raises(
        ValueError, match=r"val has images outside its class folders: 3 \(ILSVRC2012_val_00000006.JPEG, "
    ):
        opened("imagenet", imagenet)


@pytest.mark.parametrize("extracted", [0, 2])
def test_a_class_archive_of_imagenet_that_is_not_extracted_is_refused(extracted: int, imagenet: Path) -> None:
    folder = imagenet / "train/n02119789"
    layouts.tar_of(folder, imagenet / "train/n02119789.tar")
    assert len(opened("imagenet", imagenet).splits["train"]) == 17  # a complete class may keep its archive
    for path in sorted(folder.iterdir())[extracted:]:
        path.unlink()
    if not extracted:
        folder.rmdir()
    message = rf"train has the class archive n02119789.tar, and {3 - extracted} of its 3 images are not in n02119789/"
    with pytest.raises(ValueError, match=message):
        opened("imagenet", imagenet)


def test_images_of_imagenet_outside_class_folders_are_refused(imagenet: Path) -> None:
    write(imagenet / "train/n01440764_1.JPEG")
    with pytest.raises(ValueError, match=r"train has images outside its class folders: 1 \(n01440764_1.JPEG\)"):
        opened("imagenet", imagenet)


def test_the_command_ends_in_one_sentence(folder: Path, options: list[str], run: Callable[..., Any]) -> None:
    next((folder / "train" / CLASSES[0]).iterdir()).rename(folder / "train/loose.png")
    result = run("shards", *options, "--out", folder.parent / "out")
    assert (result.code, "Traceback" in result.err) == (2, False)
    assert f"error: {folder}/train has images outside its class folders: 1 (loose.png); move each" in result.err
    assert not os.path.exists(folder.parent / "out")  # noqa: PTH110


@pytest.mark.parametrize("name", ["Testing", "dev", "my_eval"])
def test_a_folder_that_is_named_like_a_split_is_not_ignored(name: str, pictures: Path) -> None:
    write(pictures / name / "cat/0.png")
    with pytest.raises(ValueError, match=f"has {name}/, which is not the name of a split; rename it to train/, valid/"):
        opened("image_folder", pictures)


def test_what_is_beside_the_splits_and_classes_that_test_lacks_are_named(
    pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("train/Cat/0.png", "more/1.png", "1.png"):
        write(pictures / name)
    opened("image_folder", pictures)
    assert f"{pictures}: ignored beside the folders of the splits: more/, 1.png" in caplog.text
    assert f"{pictures}/train has classes that differ in capitals alone: Cat, cat" in caplog.text
    assert f"{pictures}/test has no folder for 2 of train's classes: Cat, dog" in caplog.text
