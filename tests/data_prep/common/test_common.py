"""The parts of data_prep/common that the rest of the repository uses."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.common.files import atomic_folder, atomic_write, json_digest, read_json, to_json, write_json
from data_prep.common.retry import backoff, retry


class Failing:
    """Fails `failures` times before it returns."""

    def __init__(self, failures: int, error: Exception) -> None:
        self.left, self.error, self.seen = failures, error, list[tuple[str, int]]()

    def __call__(self) -> str:
        if self.left:
            self.left -= 1
            raise self.error
        return "answer"

    def pause(self, error: Exception, failures: int) -> float:
        self.seen.append((str(error), failures))
        if failures == 3:
            raise ValueError("given up") from error
        return 0.0


def test_only_the_given_errors_are_retried() -> None:
    passing = Failing(2, OSError("busy"))
    assert retry(passing, (OSError,), passing.pause) == "answer"
    assert passing.seen == [("busy", 1), ("busy", 2)]
    with pytest.raises(ValueError, match="given up"):
        retry(lasting := Failing(9, OSError("gone")), (OSError,), lasting.pause)
    assert lasting.left == 6
    with pytest.raises(KeyError):
        retry(other := Failing(1, KeyError("other")), (OSError,), other.pause)
    assert other.seen == []


def test_pauses_grow_up_to_the_longest() -> None:
    assert [backoff(failures, 0.5, factor=4, longest=10) for failures in (1, 2, 3, 4)] == [0.5, 2.0, 8.0, 10]


def test_a_digest_depends_on_the_values_alone() -> None:
    value = {"b": [1, 2.5, None], "a": {"d": True, "c": "ü"}}
    assert json_digest(value) == json_digest({"a": {"c": "ü", "d": True}, "b": [1, 2.5, None]})
    assert json_digest(value) != json_digest(value | {"b": [2.5, 1, None]})
    script = f"from data_prep.common.files import json_digest; print(json_digest({value!r}))"
    root = Path(__file__).parents[3]
    found = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True).stdout
    assert found.strip() == json_digest(value)
    assert json_digest([], separators=(",", ":")) == json_digest([])
    assert json_digest([1, 2], separators=(",", ":")) != json_digest([1, 2])


def test_a_failed_write_leaves_the_old_contents(tmp_path: Path) -> None:
    for _ in range(2):
        with atomic_write(tmp_path / "file") as temporary, atomic_folder(tmp_path / "folder") as folder:
            temporary.write_text("first")
            (folder / "file").write_text("first")
    for write in (atomic_write, atomic_folder):
        name = "file" if write is atomic_write else "folder"
        with pytest.raises(KeyboardInterrupt), write(tmp_path / name) as temporary:
            (temporary if name == "file" else temporary / "file").write_text("second")
            raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == (tmp_path / "folder/file").read_text() == "first"


def test_json_has_no_nan_and_is_read_from_earlier_versions(tmp_path: Path) -> None:
    value = {"loss": math.nan, "rows": [{"worst": -math.inf, "step": 3}], "name": "NaN"}
    without = {"loss": None, "rows": [{"worst": None, "step": 3}], "name": "NaN"}
    write_json(tmp_path / "new.json", value)
    assert "Infinity" not in (tmp_path / "new.json").read_text()
    assert json.loads(to_json(value)) == read_json(tmp_path / "new.json") == without
    (tmp_path / "old.json").write_text(json.dumps(value))  # writes NaN and -Infinity
    assert read_json(tmp_path / "old.json") == without
    with pytest.raises(TypeError):
        to_json({"path": tmp_path})
