"""Pieces of a task are done once, and are gone when the task is."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.evaluate.cache import Kept


def piece(number: int) -> dict[str, object]:
    return {"weights": np.arange(number, dtype=np.float32), "accuracy": 0.25 * number, "seeds": [1, 2]}


def refused() -> dict[str, object]:
    raise AssertionError("done twice")


def check(found: dict[str, object], number: int) -> None:
    np.testing.assert_array_equal(found.pop("weights"), np.arange(number, dtype=np.float32))
    assert found == {"accuracy": 0.25 * number, "seeds": [1, 2]}


def test_a_piece_is_done_once(tmp_path: Path) -> None:
    check(Kept(tmp_path, "probe", "a" * 64).once("layer-1", lambda: piece(3)), 3)
    check(Kept(tmp_path, "probe", "a" * 64).once("layer-1", refused), 3)
    check(Kept(tmp_path, "probe", "a" * 64).once("layer-2", lambda: piece(4)), 4)
    check(Kept(tmp_path, "probe", "b" * 64).once("layer-1", lambda: piece(5)), 5)  # other inputs
    check(Kept(tmp_path, "other", "a" * 64).once("layer-1", lambda: piece(6)), 6)


def test_a_piece_that_failed_is_not_kept(tmp_path: Path) -> None:
    kept = Kept(tmp_path, "probe", "a" * 64)
    with pytest.raises(AssertionError):
        kept.once("layer-1", refused)
    assert not list(kept.folder.iterdir()) if kept.folder.exists() else True
    check(kept.once("layer-1", lambda: piece(3)), 3)


def test_a_damaged_piece_is_done_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = Kept(tmp_path, "probe", "a" * 64)
    kept.once("layer-1", lambda: piece(3))
    (file,) = kept.folder.iterdir()
    content = bytearray(file.read_bytes())
    two = np.float32(2).tobytes()
    for damaged in (content[:100], b"", content.replace(two, np.float32(3).tobytes())):
        file.write_bytes(damaged)
        check(kept.once("layer-1", lambda: piece(4)), 4)
        assert f"{file} can't be read" in capsys.readouterr().out


def test_a_finished_task_leaves_nothing(tmp_path: Path) -> None:
    for digest in ("a" * 64, "b" * 64):
        Kept(tmp_path, "probe", digest).once("layer-1", lambda: piece(3))
    Kept(tmp_path, "other", "a" * 64).once("layer-1", lambda: piece(3))
    Kept(tmp_path, "probe", "a" * 64).clear()
    assert [path.name for path in (tmp_path / ".unfinished").iterdir()] == ["other"]
