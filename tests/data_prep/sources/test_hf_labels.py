"""Labels of Hugging Face datasets: the column, the classes, and their numbers in each split."""

import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.config import SourceConfig
from data_prep.images.decode import BadImage, Decoder
from data_prep.sources.base import MAX_CLASSES, Source
from data_prep.sources.hf_files import refuse_damaged
from data_prep.sources.open import open_source

ClassLabel = datasets.ClassLabel
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def cells(count: int) -> list[dict[str, Any]]:
    return [{"bytes": png(number), "path": None} for number in range(count)]


def table(labels: list[Any], feature: Any, **columns: tuple[Any, list[Any]]) -> datasets.Dataset:
    """A dataset with the columns image and label, and further ones, each a type and values."""
    types = {"image": datasets.Image(), "label": feature} | {name: kind for name, (kind, _) in columns.items()}
    values = {"image": cells(len(labels)), "label": labels} | {name: found for name, (_, found) in columns.items()}
    return datasets.Dataset.from_dict(values, features=datasets.Features(types))


def write_plain(folder: Path, labels: Any, kind: Any = None, name: str = "label") -> Path:
    """A parquet file without the types of datasets, as other tools write it."""
    folder.mkdir(parents=True)
    columns = {"image": pa.array(cells(len(labels)), IMAGE), name: pa.array(labels, kind)}
    pq.write_table(pa.table(columns), folder / "train.parquet")
    return folder


def opened(path: Path, **options: Any) -> Source:
    return open_source(SourceConfig(kind="hf_dataset", path=str(path), **options))


def labels_of(source: Source, split: str = "train") -> list[int]:
    if split in source.splits:
        return source.splits[split].labels.tolist()
    items = [item for stream in source.streams[split] for item in stream]
    assert not [item for item in items if isinstance(item, BadImage)]
    return [item.label for item in items]  # type: ignore[union-attr]


def write_saved(path: Path, **splits: datasets.Dataset) -> Path:
    datasets.DatasetDict(splits).save_to_disk(path)
    return path


def write_parquet(path: Path, **splits: datasets.Dataset) -> Path:
    path.mkdir()
    for split, found in splits.items():
        found.to_parquet(path / f"{split}.parquet")
    return path


@pytest.mark.parametrize("write", [write_saved, write_parquet])
def test_each_split_numbers_its_classes_in_its_own_way(tmp_path: Path, write: Callable[..., Path]) -> None:
    train = table([0, 1, 2], ClassLabel(names=["bird", "cat", "dog"]))
    test = table([0, 1, -1], ClassLabel(names=["dog", "cat"]))
    path = write(tmp_path / "set", train=train, test=test)
    for streaming in (False,) if write is write_saved else (False, True):
        source = opened(path, streaming=streaming)
        assert source.classes == ["bird", "cat", "dog"]
        assert labels_of(source) == [0, 1, 2]
        assert labels_of(source, "test") == [2, 1, -1]


@pytest.mark.parametrize("write", [write_saved, write_parquet])
def test_a_class_that_train_lacks_is_refused(tmp_path: Path, write: Callable[..., Path]) -> None:
    train, test = table([0, 1], ClassLabel(names=["cat", "dog"])), table([0, 1], ClassLabel(names=["cat", "eel"]))
    path = write(tmp_path / "set", train=train, test=test)
    for streaming in (False,) if write is write_saved else (False, True):
        with pytest.raises(ValueError, match=r"has the class 'eel' in test, which train lacks; .* one of cat, dog\."):
            opened(path, streaming=streaming)


def test_the_files_of_a_split_must_number_the_classes_alike(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for number, names in enumerate((["bird", "cat", "dog"], ["cat", "dog"])):
        table([0, 1], ClassLabel(names=names)).to_parquet(tmp_path / f"set/train-{number}.parquet")
    with pytest.raises(ValueError, match=r"train-1\.parquet has other classes in the column 'label' than .*train-0"):
        opened(tmp_path / "set")


def test_a_split_without_the_label_column_is_unlabelled(tmp_path: Path) -> None:
    named = table([1, 0], ClassLabel(names=["cat", "dog"]))
    source = opened(write_saved(tmp_path / "set", train=named, test=named.remove_columns("label")))
    assert (labels_of(source), labels_of(source, "test")) == ([1, 0], [-1, -1])


@pytest.mark.parametrize(
    ("name", "labels", "kind", "classes", "expected"),
    [
        ("label", ["dog", "cat", None, "", "dog"], pa.string(), ["cat", "dog"], [1, 0, -1, -1, 1]),
        ("label", ["dog", "cat"], pa.large_string(), ["cat", "dog"], [1, 0]),
        ("label", [True, False, None], pa.bool_(), ["False", "True"], [1, 0, -1]),
        ("labels", [7, 10, -1, 7], pa.int16(), ["7", "10"], [0, 1, -1, 0]),
        ("cls", [1, 0], pa.uint64(), ["0", "1"], [1, 0]),
        ("Label", ["b", "a"], pa.string(), ["a", "b"], [1, 0]),
    ],
)
def test_columns_that_are_taken_for_labels(
    tmp_path: Path, name: str, labels: list[Any], kind: Any, classes: list[str], expected: list[int]
) -> None:
    path = write_plain(tmp_path / "set", labels, kind, name)
    for streaming in (False, True):
        source = opened(path, streaming=streaming)
        assert (source.classes, labels_of(source)) == (classes, expected)


def test_other_columns_are_listed_and_the_images_unlabelled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_plain(tmp_path / "set", [0.5, 1.0])
    with caplog.at_level(logging.WARNING):
        assert labels_of(opened(path)) == [-1, -1]
    assert "all images are unlabelled; it has the columns image (struct), label (float64);" in caplog.text
    with pytest.raises(
        ValueError, match=r"label_column is 'label'; .* must be of type ClassLabel, .*label \(float64\)"
    ):
        opened(path, label_column="label")


def test_a_named_column_of_strings(tmp_path: Path) -> None:
    path = write_plain(tmp_path / "set", ["b", "a"], name="species")
    source = opened(path, label_column="species")
    assert (source.classes, labels_of(source)) == (["a", "b"], [1, 0])


def test_strings_of_other_files_are_not_streamed(tmp_path: Path) -> None:
    """Their classes would be known only at the end."""
    (tmp_path / "set/train").mkdir(parents=True)
    for name in "ab":
        (tmp_path / f"set/train/{name}.png").write_bytes(png(0))
    (tmp_path / "set/train/metadata.csv").write_text("file_name,label\na.png,dog\nb.png,cat\n")
    assert labels_of(opened(tmp_path / "set")) == [1, 0]
    with pytest.raises(ValueError, match=r"source\.label_column 'label' .* strings, .*; set source\.streaming false"):
        opened(tmp_path / "set", streaming=True)


@pytest.mark.parametrize("value", [MAX_CLASSES, 20_000_001, 1_700_000_000, 2**32, 2**63, -7])
def test_numbers_that_are_no_classes_are_refused(tmp_path: Path, value: int) -> None:
    path = write_plain(tmp_path / "set", [1, value], pa.int64() if value < 2**63 else pa.uint64())
    for streaming in (False, True):
        with pytest.raises(ValueError, match=rf"label_column 'label' .* has the value {value} in train; .* 999,999"):
            labels_of(opened(path, streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
def test_of_integers_the_classes_are_those_that_occur(tmp_path: Path, streaming: bool) -> None:
    integer = datasets.Value("int64")
    path = write_parquet(tmp_path / "set", train=table([900, 3, 900, None], integer), test=table([3], integer))
    source = opened(path, streaming=streaming)
    assert source.classes == ["3", "900"]
    assert (labels_of(source), labels_of(source, "test")) == ([1, 0, 1, -1], [0])
    table([3, 7], integer).to_parquet(path / "test.parquet")
    with pytest.raises(ValueError, match="has the class '7' in test, which train lacks; it must be one of 3, 900"):
        opened(path, streaming=streaming)


def test_a_label_beyond_the_declared_classes_is_refused(tmp_path: Path) -> None:
    declared = table([0, 1], ClassLabel(names=["cat", "dog"])).with_format("arrow")
    schema = declared.data.schema
    folder = tmp_path / "set"
    folder.mkdir()
    pq.write_table(pa.table({"image": cells(2), "label": pa.array([0, 7])}, schema=schema), folder / "train.parquet")
    with pytest.raises(
        ValueError, match=r"has the value 7 in train, which is none of its 2 classes; it must be 0 to 1,"
    ):
        opened(folder)


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_of_splits_are_not_classes(tmp_path: Path, streaming: bool) -> None:
    for name in ("train/a", "train/b", "test/a"):
        (tmp_path / f"set/{name}.png").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"set/{name}.png").write_bytes(png(0))
    source = opened(tmp_path / "set", streaming=streaming)
    assert (source.classes, labels_of(source), labels_of(source, "test")) == ([], [-1, -1], [-1])


def test_a_class_may_have_the_name_of_a_split(tmp_path: Path) -> None:
    vehicles = table([0, 1], ClassLabel(names=["car", "train"]))
    assert labels_of(opened(write_saved(tmp_path / "set", train=vehicles))) == [0, 1]


def test_a_file_that_would_be_in_two_splits_is_refused(tmp_path: Path) -> None:
    for name in ("train/car", "train/train", "test/car", "test/train"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "a.png").write_bytes(png(0))
    with pytest.raises(ValueError, match=r"test/train/a\.png would be in train and in test, .* rename its folder"):
        opened(tmp_path / "set")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("train", [("train/cat", "train/dog"), ("train/images",)])
def test_a_folder_of_test_that_train_lacks_is_refused(tmp_path: Path, train: tuple[str, ...], streaming: bool) -> None:
    for name in (*train, "test/eel"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "a.png").write_bytes(png(0))
    with pytest.raises(ValueError, match="has the class 'eel' in test, which train lacks"):
        opened(tmp_path / "set", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_only_the_columns_of_images_and_labels_are_read(tmp_path: Path, streaming: bool) -> None:
    bad = [{"bytes": b"neither image nor sound", "path": None}] * 2
    stored = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    labels = table([1, 0], ClassLabel(names=["cat", "dog"]), mask=(datasets.Image(), bad), sound=(stored, bad))
    splits = {"train": labels.cast_column("sound", datasets.Audio())}
    write = write_parquet if streaming else write_saved
    source = opened(write(tmp_path / "set", **splits), image_column="image", streaming=streaming)
    assert labels_of(source) == [1, 0]
    if not streaming:
        assert source.splits["train"].image(1, Decoder()).shape == (8, 8, 3)


def test_a_damaged_column_that_is_not_read_does_no_harm(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).bytes(1000)
    labels = table([1, 0], ClassLabel(names=["cat", "dog"]), noise=(datasets.Value("binary"), [noise] * 2))
    path = write_parquet(tmp_path / "set", train=labels)
    overwrite(path / "train.parquet", (path / "train.parquet").read_bytes().index(noise[:100]) - 8, 8)
    assert labels_of(opened(path, streaming=True)) == [1, 0]
    with pytest.raises(ValueError, match=r"train\.parquet is damaged \("):
        opened(path)


def overwrite(file: Path, start: int, size: int) -> None:
    """Zeros, as a broken copy has them."""
    content = file.read_bytes()
    file.write_bytes(content[:start] + bytes(size) + content[start + size :])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("damage", ["cut", "zeroed"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str, streaming: bool) -> None:
    same = table([0, 1], ClassLabel(names=["cat", "dog"]))
    path = write_parquet(tmp_path / "set", train=same, test=same)
    file = path / "test.parquet"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        overwrite(file, 4, 60)
    with pytest.raises(ValueError, match=rf"{file} is damaged \(.{{10,}}\); download or write it again\."):
        labels_of(opened(path, streaming=streaming), "test")


@pytest.mark.parametrize("streaming", [False, True])
def test_arrow_files_and_arrow_streams_give_the_same(tmp_path: Path, streaming: bool) -> None:
    stored = table([1, 0, 1], ClassLabel(names=["cat", "dog"])).data.table.combine_chunks()
    for name, create in (("file", pa.ipc.new_file), ("stream", pa.ipc.new_stream)):
        file = tmp_path / name / "train.arrow"
        file.parent.mkdir()
        with create(str(file), stored.schema) as writer:
            writer.write_table(stored, max_chunksize=2)
        refuse_damaged([str(file)], completely=True)
        source = opened(file.parent, streaming=streaming)
        assert (source.classes, labels_of(source)) == (["cat", "dog"], [1, 0, 1])
        file.write_bytes(file.read_bytes()[:-300])
        with pytest.raises(ValueError, match=rf"{file} is damaged \("):
            refuse_damaged([str(file)], completely=True)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_file_that_can_not_be_read_is_not_damaged(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{tmp_path / name} can't be read \(No such file or directory\)\.$"):
        refuse_damaged([str(tmp_path / name)])


def test_classes_of_a_stream_are_those_of_train(tmp_path: Path) -> None:
    path = write_plain(tmp_path / "set", [None, None], pa.int64())
    table([0, 1], ClassLabel(names=["cat", "dog"])).to_parquet(path / "test.parquet")
    with pytest.raises(ValueError, match=r"has the class 'cat' in test, which train lacks"):
        opened(path, streaming=True)


def test_a_damaged_arrow_file_is_named(tmp_path: Path) -> None:
    write_saved(tmp_path / "set", train=table([0, 1], ClassLabel(names=["cat", "dog"])))
    (file,) = (tmp_path / "set/train").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(ValueError, match=rf"{file} is damaged \("):
        opened(tmp_path / "set")


def test_the_subsets_are_listed(tmp_path: Path) -> None:
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in ("small", "large"))
    for name in ("small", "large"):
        write_plain(tmp_path / "set" / name, [0, 1])
    (tmp_path / "set/README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    with pytest.raises(ValueError, match=r"source\.subset is not set; in .* it must be one of small, large\."):
        opened(tmp_path / "set")
    with pytest.raises(ValueError, match=r"source\.subset is 'tiny'; in .* it must be one of small, large\."):
        opened(tmp_path / "set", subset="tiny")
    assert labels_of(opened(tmp_path / "set", subset="small")) == [0, 1]


def test_a_saved_folder_has_no_subsets(tmp_path: Path) -> None:
    path = write_saved(tmp_path / "set", train=table([0, 1], ClassLabel(names=["cat", "dog"])))
    with pytest.raises(ValueError, match=r"source\.subset is 'small', but .* has no subsets; remove source\.subset\."):
        opened(path, subset="small")


def test_files_with_other_columns_are_named(tmp_path: Path) -> None:
    labels = table([0, 1], ClassLabel(names=["cat", "dog"]))
    path = write_parquet(tmp_path / "set", train=labels, test=labels.rename_column("label", "class"))
    with pytest.raises(ValueError, match=r"test\.parquet has the columns class, image, but .* label; all files"):
        opened(path)
    with pytest.raises(ValueError, match=r"test\.parquet has no column 'label'; all files"):
        opened(path, streaming=True)
