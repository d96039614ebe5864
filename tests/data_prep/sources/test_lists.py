"""Text files of the official layouts that an editor or a script saved otherwise: they mean the same."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep.images.crops import area_resize
from data_prep.sources.base import Source
from tests.data_prep.sources import official_layouts as layouts
from tests.data_prep.sources.reading import opened

BOM = b"\xef\xbb\xbf"


def kaggle(root: Path, windows: list[np.ndarray]) -> None:
    layouts.write_imagenet(root, windows)
    layouts.to_kaggle(root)


def stl10(root: Path, windows: list[np.ndarray]) -> None:
    layouts.write_stl10(root, [area_resize(one[:64, :64], 96) for one in windows], 22, 11)


def contents(source: Source) -> dict[str, object]:
    splits = {
        name: (images.labels.tolist(), list(getattr(images, "names", []))) for name, images in source.splits.items()
    }
    return {"classes": source.classes, **splits}


@pytest.mark.parametrize(
    ("kind", "write", "names"),
    [
        ("places205", layouts.write_places205, ["train_places205.csv", "val_places205.csv"]),
        ("coco", layouts.write_coco, ["instances_train2017.json"]),
        ("stl10", stl10, ["class_names.txt"]),
        ("imagenet", layouts.write_imagenet, ["ILSVRC2012_validation_ground_truth.txt"]),
        ("imagenet", kaggle, ["LOC_synset_mapping.txt", "LOC_val_solution.csv"]),
    ],
)
def test_a_byte_order_mark_is_ignored(
    tmp_path: Path, windows: list[np.ndarray], kind: str, write: Callable[..., None], names: list[str]
) -> None:
    root = tmp_path / "set"
    write(root, windows)
    expected = contents(opened(kind, root))
    files = [next(root.rglob(name)) for name in names]
    for file in files:
        file.write_bytes(BOM + file.read_bytes())
    assert contents(opened(kind, root)) == expected


def test_a_byte_order_mark_in_the_class_names_of_cifar(write_cifar: Callable[[str, str], Path]) -> None:
    folder = write_cifar("cifar10", "binary")
    names = folder / "batches.meta.txt"
    names.write_bytes(BOM + names.read_bytes())
    assert opened("cifar10", folder).classes == [f"class{number}" for number in range(10)]


@pytest.mark.parametrize("prefix", ["/", "./", "//"])
def test_a_slash_before_the_paths_of_places205_is_ignored(
    tmp_path: Path, windows: list[np.ndarray], prefix: str
) -> None:
    layouts.write_places205(tmp_path, windows)
    expected = contents(opened("places205", tmp_path))
    for file in tmp_path.rglob("*.csv"):
        file.write_text("".join(f"{prefix}{line}\r\n" for line in file.read_text().splitlines()))
    assert contents(opened("places205", tmp_path)) == expected
