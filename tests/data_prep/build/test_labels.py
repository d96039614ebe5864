"""What the report of a prepared set states about its labels."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.build import merge
from data_prep.build.plan import Unit
from data_prep.build.state import UnfinishedSet
from data_prep.shards.reader import open_shard_set
from tests.data_prep.tar_files import encode_image, tar_bytes

Small = tuple[np.ndarray, np.ndarray]


@pytest.fixture
def prepared(tmp_path: Path, small: Small, run: Callable[..., Any]) -> Callable[[list[str]], Any]:
    """Prepares a tar of images with the given contents of their .cls, "" for none, in this process."""

    def prepare(labels: list[str]) -> Any:
        members = []
        for number, label in enumerate(labels):
            members.append((f"{number}.png", encode_image(small[0][number])))
            members += [(f"{number}.cls", label.encode())] if label else []
        (tmp_path / "tars").mkdir()
        (tmp_path / "tars/0.tar").write_bytes(tar_bytes(members))
        return run(
            *("shards", "--source.kind", "webdataset", "--source.path", tmp_path / "tars", "--out", tmp_path / "out"),
            *("--resolution", "8", "--palette.colors", "16", "--valid_fraction", "0", "--workers", "1"),
        )

    return prepare


def test_the_report_counts_the_classes_that_occur_and_the_unlabelled_images(
    tmp_path: Path, prepared: Callable[[list[str]], Any]
) -> None:
    result = prepared(["3", "90", "", "3", "", ""])
    assert result.code == 0
    assert "2 of 91 classes have images" in result.err
    assert "6 images, 3 unlabelled;" in result.err
    stored = open_shard_set(tmp_path / "out")
    assert sorted(stored.split("train").record(0)[1].tolist()) == [-1, -1, -1, 3, 3, 90]
    assert len(stored.classes) == 91


def test_a_set_without_labels_is_reported(prepared: Callable[[list[str]], Any]) -> None:
    result = prepared(["", ""])
    assert result.code == 0
    assert "has no labels (labels are read from .cls, where there is one): classifiers can't be" in result.err


@pytest.mark.parametrize("label", ["1700000000", "20000001"])
def test_numbers_that_are_no_classes_end_the_preparation(prepared: Callable[[list[str]], Any], label: str) -> None:
    result = prepared([label, "1", "0"])
    assert result.code == 2
    assert f"its label is '{label}', not an integer from 0 to 999,999" in result.err


@pytest.mark.parametrize(
    ("named", "labels", "classes"),
    [(["a", "b"], [0], ["a", "b"]), ([], [0, 2], ["0", "1", "2"]), ([], [], []), (["a", "b"], [0, 2], None)],
)
def test_a_label_beyond_the_classes_of_the_source_is_an_error(
    named: list[str], labels: list[int], classes: list[str] | None
) -> None:
    if classes is None:
        with pytest.raises(ValueError, match="an image has the label 2, but the source names 2 classes"):
            merge.classes_of(named, np.array(labels, int))
    else:
        assert merge.classes_of(named, np.array(labels, int)) == classes


def test_the_labels_of_a_unit_are_stored_as_an_array(tmp_path: Path) -> None:
    unfinished, unit = UnfinishedSet(tmp_path / "set"), Unit("train", 0)
    unfinished.start({})
    digests = {"train": np.arange(3, dtype=np.uint64)}
    unfinished.save_result(unit, {"shards": {}}, digests, np.array([3, 90], np.uint32))
    assert unfinished.load_result(unit) == {"shards": {}}
    assert unfinished.load_labels(unit).tolist() == [3, 90]
    np.savez(unfinished.folder / f"{unit.name}.npz", **digests)  # type: ignore[arg-type]  # as an older version did
    assert unfinished.load_result(unit) is None
