import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep.config import SourceConfig
from data_prep.images.decode import Decoder
from data_prep.shards.reader import open_shard_set
from data_prep.sources.base import Images, Source
from data_prep.sources.open import open_source
from tests.data_prep.small_data import CLASSES, archive_of, write_folder
from tests.data_prep.sources.reading import Expected, check_shards, reduced

Small = tuple[np.ndarray, np.ndarray]


def all_images(images: Images) -> np.ndarray:
    return np.stack([images.image(index, Decoder()) for index in range(len(images))])


def opened(kind: str, path: Path, **options: object) -> Source:
    return open_source(SourceConfig(kind=kind, path=str(path), **options))


# --- image folder


def test_folder_has_every_image_with_its_class(folder: Path, small: Small) -> None:
    source = opened("image_folder", folder)
    assert source.classes == CLASSES
    assert {name: len(images) for name, images in source.splits.items()} == {"train": 48, "test": 12}
    test = np.arange(60) % 5 == 0
    assert (source.splits["train"].labels == small[1][~test]).all()
    assert (all_images(source.splits["train"]) == small[0][~test]).all()


def test_folder_may_have_a_validation_split_and_subfolders(folder: Path, small: Small) -> None:
    write_folder(folder / "val", small[0][:2], small[1][:2])
    deep = folder / "train/cat/more/deep"
    deep.mkdir(parents=True)
    next((folder / "train/cat").glob("*.png")).rename(deep / "b.PNG")
    (folder / "train/cat/notes.txt").write_text("ignored")
    (folder / "train/cat/.hidden.png").write_text("ignored")
    source = opened("image_folder", folder)
    assert {name: len(images) for name, images in source.splits.items()} == {"train": 48, "valid": 2, "test": 12}


def test_adding_an_image_changes_the_fingerprint(folder: Path) -> None:
    before = opened("image_folder", folder).fingerprint
    assert opened("image_folder", folder).fingerprint == before
    (folder / "train/cat/one_more.jpg").touch()
    assert opened("image_folder", folder).fingerprint != before


# --- CIFAR


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
@pytest.mark.parametrize("version", ["python", "binary"])
@pytest.mark.parametrize("place", ["folder", "parent", "archive"])
def test_cifar_layouts(
    kind: str,
    version: str,
    place: str,
    write_cifar: Callable[[str, str], Path],
    small: Small,
) -> None:
    folder = write_cifar(kind, version)
    source = opened(kind, {"folder": folder, "parent": folder.parent}.get(place) or archive_of(folder))
    assert len(source.classes) == int(kind.removeprefix("cifar"))
    assert source.classes[3] == "class3"
    for split, part in (("train", slice(0, 50)), ("test", slice(50, 60))):
        assert (all_images(source.splits[split]) == small[0][part]).all()
        assert (source.splits[split].labels == small[1][part]).all()


def test_arrays_pickled_by_numpy_1_are_read(write_cifar: Callable[[str, str], Path], small: Small) -> None:
    """The published files name numpy.core, which later versions of numpy call numpy._core."""
    folder = write_cifar("cifar10", "python")
    for batch in folder.glob("*_batch*"):
        batch.write_bytes(batch.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert b"numpy.core" in (folder / "test_batch").read_bytes()
    assert (all_images(opened("cifar10", folder).splits["test"]) == small[0][50:]).all()


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("was-run"),)


def test_a_pickle_can_not_run_code(
    write_cifar: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_cifar("cifar10", "python")
    (folder / "data_batch_3").write_bytes(pickle.dumps({b"data": Malicious(), b"labels": []}))
    with pytest.raises(ValueError, match="data_batch_3 is not a batch"):
        opened("cifar10", folder)
    assert not Path("was-run").exists()


@pytest.mark.parametrize("version", ["python", "binary"])
def test_a_truncated_batch_is_named(version: str, write_cifar: Callable[[str, str], Path]) -> None:
    folder = write_cifar("cifar100", version)
    file = folder / {"python": "train", "binary": "train.bin"}[version]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=file.name):
        opened("cifar100", folder)


def test_a_missing_batch_is_named(write_cifar: Callable[[str, str], Path]) -> None:
    folder = write_cifar("cifar10", "binary")
    (folder / "data_batch_4.bin").unlink()
    with pytest.raises(ValueError, match=r"has no data_batch_4\.bin"):
        opened("cifar10", folder)


def test_labels_outside_the_classes_are_an_error(write_cifar: Callable[[str, str], Path]) -> None:
    folder = write_cifar("cifar10", "binary")
    content = bytearray((folder / "test_batch.bin").read_bytes())
    content[0] = 10
    (folder / "test_batch.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"test_batch\.bin has a label outside 0 to 9"):
        opened("cifar10", folder)


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
