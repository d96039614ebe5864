"""Cached values are computed once, and deleted when the task is finished."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from pipeline.evaluate.cache import CachedArray, TaskCache, clear_unfinished


def value(number: int) -> dict[str, object]:
    return {"weights": np.arange(number, dtype=np.float32), "accuracy": 0.25 * number, "seeds": [1, 2]}


def fail_if_called() -> dict[str, object]:
    raise AssertionError("done twice")


def check(found: dict[str, object], number: int) -> None:
    np.testing.assert_array_equal(found.pop("weights"), np.arange(number, dtype=np.float32))
    assert found == {"accuracy": 0.25 * number, "seeds": [1, 2]}


def test_a_value_is_computed_once(tmp_path: Path) -> None:
    check(TaskCache.of_task(tmp_path, "probe", "a" * 64).get_or_compute("layer-1", lambda: value(3)), 3)
    check(TaskCache.of_task(tmp_path, "probe", "a" * 64).get_or_compute("layer-1", fail_if_called), 3)
    check(TaskCache.of_task(tmp_path, "probe", "a" * 64).get_or_compute("layer-2", lambda: value(4)), 4)
    check(TaskCache.of_task(tmp_path, "probe", "b" * 64).get_or_compute("layer-1", lambda: value(5)), 5)  # other inputs
    check(TaskCache.of_task(tmp_path, "other", "a" * 64).get_or_compute("layer-1", lambda: value(6)), 6)


def test_a_failed_computation_is_not_cached(tmp_path: Path) -> None:
    cache = TaskCache.of_task(tmp_path, "probe", "a" * 64)
    with pytest.raises(AssertionError):
        cache.get_or_compute("layer-1", fail_if_called)
    assert not list(cache.folder.iterdir()) if cache.folder.exists() else True
    check(cache.get_or_compute("layer-1", lambda: value(3)), 3)


def test_a_damaged_value_is_recomputed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = TaskCache.of_task(tmp_path, "probe", "a" * 64)
    cache.get_or_compute("layer-1", lambda: value(3))
    (file,) = cache.folder.iterdir()
    content = bytearray(file.read_bytes())
    two = np.float32(2).tobytes()
    for damaged in (content[:100], b"", content.replace(two, np.float32(3).tobytes())):
        file.write_bytes(damaged)
        check(cache.get_or_compute("layer-1", lambda: value(4)), 4)
        assert f"{file} can't be read; its content is recomputed" in caplog.text
        caplog.clear()


def test_a_finished_task_leaves_nothing(tmp_path: Path) -> None:
    for digest in ("a" * 64, "b" * 64):
        TaskCache.of_task(tmp_path, "probe", digest).get_or_compute("layer-1", lambda: value(3))
    TaskCache.of_task(tmp_path, "other", "a" * 64).get_or_compute("layer-1", lambda: value(3))
    clear_unfinished(tmp_path, "probe")
    assert [path.name for path in (tmp_path / ".unfinished").iterdir()] == ["other"]


def test_a_value_comes_back_as_it_was(tmp_path: Path) -> None:
    """The state of a training: arrays of any type, and of no dimension, with nested JSON."""
    value = {
        "record": {"losses": [[0.5, float("nan")]]},
        "weights/a.weight": np.eye(2, dtype=np.float32),
        "moments/0/step": np.array(3, np.float32),
        "moments/0/mean": np.zeros((2, 2)),
    }
    cache = TaskCache.of_task(tmp_path, "fine_tune", "a" * 64)
    for found in (cache.put("rate-1/state", value), cache.get("rate-1/state")):
        assert found is not None
        np.testing.assert_equal(found, value)
        assert found["moments/0/step"].shape == () and found["weights/a.weight"].dtype == np.float32
    assert cache.get("rate-2/state") is None


def test_only_the_named_value_is_retained(tmp_path: Path) -> None:
    cache = TaskCache.of_task(tmp_path, "fine_tune", "a" * 64)
    for name in ("rate-1/epoch-1", "rate-1/epoch-2", "rate-1/state", "rate-2/epoch-1"):
        cache.put(name, value(1))
    cache.keep_only("rate-1/epoch-*", "rate-1/epoch-2")
    found = sorted(str(path.relative_to(cache.folder)) for path in cache.folder.rglob("*.npz"))
    assert found == ["rate-1/epoch-2.npz", "rate-1/state.npz", "rate-2/epoch-1.npz"]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_names_the_file(error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves nothing half-written."""

    def full(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(np, "savez", full)
    (tmp_path / "features").mkdir()
    array, cache = CachedArray(tmp_path / "features", "test"), TaskCache(tmp_path / "features")
    for work, name in ((lambda: array.reserve((2, 3, 4)), "test.npy"), (lambda: cache.put("a", value(3)), "a.npz")):
        with pytest.raises(OSError) as caught:
            work()
        assert (caught.value.errno, caught.value.filename) == (error, str(tmp_path / "features" / name))
    assert not list((tmp_path / "features").iterdir())
