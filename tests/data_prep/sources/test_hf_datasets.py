import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from data_prep.config import SourceConfig
from data_prep.images.decode import Decoder
from data_prep.shards.reader import open_shard_set
from data_prep.sources.base import Encoded, Source
from data_prep.sources.open import open_source
from tests.data_prep.sources.reading import check_shards, reduced

Small = tuple[np.ndarray, np.ndarray]
NAMES = ["astronaut", "cat", "coffee"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)


@pytest.fixture
def table(small: Small) -> Callable[..., Any]:
    """A dataset of some of the small images, with optional further columns."""

    def build(part: slice, **columns: Any) -> Any:
        features = {"img": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
        values = {"img": [Image.fromarray(p) for p in small[0][part]], "label": small[1][part].tolist()}
        for name, feature in columns.items():
            features[name], values[name] = feature, values["label"]
        return datasets.Dataset.from_dict(values, features=datasets.Features(features))

    return build


def opened(path: Path, **options: Any) -> Source:
    return open_source(SourceConfig(kind="hf_dataset", path=str(path), **options))


def parquet_folder(folder: Path, **splits: Any) -> Path:
    folder.mkdir()
    for split, table in splits.items():
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def assert_same(source: Source, split: str, small: Small, part: slice) -> None:
    images = source.splits[split]
    assert (images.labels == small[1][part]).all()
    assert all((images.image(i, Decoder()) == want).all() for i, want in enumerate(small[0][part]))


def test_a_saved_dictionary_of_splits(tmp_path: Path, table: Callable[..., Any], small: Small) -> None:
    splits = {"train": table(slice(0, 40)), "validation": table(slice(40, 50)), "test": table(slice(50, 60))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    source = opened(tmp_path / "saved")
    assert source.classes == NAMES
    assert_same(source, "train", small, slice(0, 40))
    assert_same(source, "valid", small, slice(40, 50))
    assert_same(source, "test", small, slice(50, 60))


def test_one_saved_table_is_the_training_split(tmp_path: Path, table: Callable[..., Any], small: Small) -> None:
    table(slice(0, 9)).save_to_disk(tmp_path / "saved")
    assert_same(opened(tmp_path / "saved"), "train", small, slice(0, 9))


def test_parquet_files(tmp_path: Path, table: Callable[..., Any], small: Small) -> None:
    folder = parquet_folder(tmp_path / "parquet", train=table(slice(0, 40)), test=table(slice(40, 60)))
    source = opened(folder)
    assert_same(source, "train", small, slice(0, 40))
    assert_same(source, "test", small, slice(40, 60))


@pytest.mark.parametrize("integer", ["int64", "uint8"])
def test_parquet_files_without_the_types_of_datasets(tmp_path: Path, small: Small, integer: str) -> None:
    """As other tools write them: images are structs of bytes and path, labels are plain numbers."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def png(pixels: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()

    rows = [{"image": {"bytes": png(p), "path": None}, "label": int(n)} for p, n in zip(*small, strict=True)]
    kinds = [("bytes", pa.binary()), ("path", pa.string())]
    schema = pa.schema([("image", pa.struct(kinds)), ("label", integer)])
    (tmp_path / "plain").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "plain/train.parquet")
    source = opened(tmp_path / "plain")
    assert_same(source, "train", small, slice(0, 60))
    assert source.classes == ["0", "1", "2"]


def test_a_stream_gives_the_same(tmp_path: Path, table: Callable[..., Any], small: Small) -> None:
    folder = parquet_folder(tmp_path / "parquet", train=table(slice(0, 40)))
    source = opened(folder, streaming=True)
    (piece,) = source.streams["train"]
    items = [item for item in piece if isinstance(item, Encoded)]
    assert [item.label for item in items] == small[1][:40].tolist()
    decoded = [Decoder()(item.content, item.name) for item in items]
    assert (np.stack(decoded) == small[0][:40]).all()


def test_missing_labels_are_minus_one(tmp_path: Path, table: Callable[..., Any]) -> None:
    table(slice(0, 9)).remove_columns("label").save_to_disk(tmp_path / "bare")
    source = opened(tmp_path / "bare")
    assert source.splits["train"].labels.tolist() == [-1] * 9
    assert source.classes == []


def test_of_two_columns_of_classes_one_must_be_named(tmp_path: Path, table: Callable[..., Any], small: Small) -> None:
    table(slice(0, 9), coarse=datasets.ClassLabel(names=[*NAMES, "x"])).save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match=r"source\.label_column .*label, coarse"):
        opened(tmp_path / "two")
    assert opened(tmp_path / "two", label_column="coarse").classes == [*NAMES, "x"]


@pytest.mark.parametrize("option", ["image_column", "label_column"])
def test_a_missing_column_is_named(option: str, tmp_path: Path, table: Callable[..., Any]) -> None:
    table(slice(0, 9)).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=rf"source\.{option} is 'nope'"):
        opened(tmp_path / "saved", **{option: "nope"})


def test_a_dataset_needs_a_training_split(tmp_path: Path, table: Callable[..., Any]) -> None:
    datasets.DatasetDict({"test": table(slice(0, 9))}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="it must have train"):
        opened(tmp_path / "saved")


def test_no_such_dataset(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="can't be loaded as a Hugging Face dataset"):
        opened(tmp_path / "nothing")


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
