"""Which tars of a folder, or of an expression with braces, are read, and as which split, by their names."""

from pathlib import Path

import pytest

from data_prep.config import SourceConfig
from data_prep.sources.base import Source
from data_prep.sources.open import open_source
from tests.data_prep.tar_files import tar_bytes


def opened(path: object) -> Source:
    return open_source(SourceConfig(kind="webdataset", path=str(path)))


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["training_0aa1", "test_66c2"], "test and training in one folder.* [(]test_66c2.tar, training_0aa1.tar[)]"),
        (["cc3m-00000", "cc3m-val-00000"], "no named split and val in one folder"),
        (["a.train.0", "a.DEV.0"], "dev and train"),
        (["shard-evaluation-0", "shard-0"], "evaluation and no named split"),
        (["testing1", "testing2"], "has tars of testing in one folder"),
        (["train_val_0", "test_0"], "test, train and val"),
    ],
)
def test_words_for_splits_in_names_are_known(tmp_path: Path, names: list[str], found: str) -> None:
    for name in names:
        (tmp_path / f"{name}.tar").write_bytes(tar_bytes([]))
    with pytest.raises(ValueError, match=found):
        opened(tmp_path)


def test_words_that_only_look_like_splits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [
        "latest-0",
        "contest_1",
        "strain0",
        "devil",
        "medieval-2",
        "interval3",
        "trained-4",
        "training-5",
        "train6",
    ]
    for name in [*names, "val-0"]:
        (tmp_path / f"{name}.tar").write_bytes(tar_bytes([]))
    assert len(opened(f"{tmp_path}/{{{','.join(names)}}}.tar").streams["train"]) == 9 and not caplog.records
    assert len(opened(f"{tmp_path}/{{val-0,train6}}.tar").streams["train"]) == 2
    assert "selects tars of train and val; all of them become train" in caplog.text
    (tmp_path / "val-0.tar").unlink()
    assert len(opened(tmp_path).streams["train"]) == 9


def test_archives_that_can_not_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "00000.tar").write_bytes(tar_bytes([]))
    (tmp_path / "00001.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    (tmp_path / "00000.tar.idx").touch()
    with pytest.raises(ValueError, match=r"/00001.tar.zst can't be read; .* decompress it"):
        opened(tmp_path)


def test_tars_beside_folders_and_two_folders_of_a_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train/0.tar", "val/0.tar", "1.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(tar_bytes([]))
    assert set(opened(tmp_path).streams) == {"train", "valid"}
    assert "has 1.tar beside folders of splits; it is not read" in caplog.text
    (tmp_path / "validation").mkdir()
    with pytest.raises(ValueError, match="has val/ and validation/ for valid; keep one"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("query", "other", "same"),
    [
        ("?id=1", "?id=2", False),
        ("?id={1..2}", "?id={2..3}", False),
        ("?id=1&X-Amz-Signature=a&X-Amz-Date=1", "?id=1&X-Amz-Signature=b&X-Amz-Date=2", True),
        ("?Expires=1&Signature=a&Key-Pair-Id=K", "?Expires=2&Signature=b&Key-Pair-Id=L", True),
        ("?sv=2020&se=1&sig=a%3D", "?sv=2021&se=2&sig=b%3D", True),
    ],
)
def test_the_fingerprint_depends_on_queries_but_not_on_signatures(query: str, other: str, same: bool) -> None:
    first, second = (opened(f"https://host/get.tar{text}").fingerprint for text in (query, other))
    assert (first == second) == same
