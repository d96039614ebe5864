"""Results of this and other versions: what can be read, and the reasons for the rest."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.results.schema import read_results
from pipeline.results.task_files import FORMAT, VERSION, read_task_files

KNOWN = {
    "task": "some_probe",
    "model_digest": "a" * 64,
    "dataset": "dots",
    "dataset_digest": "b" * 64,
    "command": "python -m pipeline evaluate",
    "test_accuracy": 0.5,
}
CURRENT = KNOWN | {"format": FORMAT, "version": VERSION, "title": "P", "summary": "s", "headlines": []}


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in CURRENT.items() if key not in keys}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (CURRENT | {"version": 2}, "has version 2 of its format; this program reads up to 1"),
        (CURRENT | {"version": "new"}, "has version new of its format"),
        (without("model_digest"), "has no model_digest"),
        (without("dataset_digest"), "has no dataset_digest"),
        (CURRENT | {"task": 3}, "has no task"),
        (CURRENT | {"headlines": [{"title": "of another shape"}]}, "has other keys than this program knows (TypeError"),
        (CURRENT | {"headlines": [{"name": "N", "value": "high", "unit": "nats"}]}, "has other keys than this program"),
        (
            KNOWN | {"task": "density", "inputs_digest": "c"},
            "has other keys than this program knows (KeyError('masked'",
        ),
        (KNOWN | {"task": "completions", "inputs_digest": "c"}, "has other keys than this program knows (KeyError"),
    ],
)
def test_what_cannot_be_read_is_named_with_the_reason(content: dict[str, Any], reason: str, tmp_path: Path) -> None:
    (tmp_path / "some.json").write_text(json.dumps(content))
    (tmp_path / "good.json").write_text(json.dumps(CURRENT))
    readable, unreadable = read_task_files(tmp_path)
    assert [path.name for path in readable] == ["good.json"]
    assert list(unreadable) == ["some.json"]
    assert unreadable["some.json"].startswith(reason)
    assert list(read_results(tmp_path)) == ["some_probe"]


def test_damaged_files_are_named_and_others_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text(json.dumps(CURRENT)[:50])
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "notes.json").write_text("[1]")
    (tmp_path / "results.json").write_text('{"format": "image-gpt-results", "version": 9}')
    (tmp_path / "folder.json").mkdir()
    readable, unreadable = read_task_files(tmp_path)
    assert not readable
    assert sorted(unreadable) == ["binary.json", "cut.json", "folder.json"]
    assert unreadable["cut.json"].startswith("is not readable as JSON")
    assert read_task_files(tmp_path / "absent") == ({}, {})


def test_results_without_a_version_are_read(tmp_path: Path) -> None:
    """And NaN, which earlier versions wrote, is missing."""
    (tmp_path / "old.json").write_text(json.dumps(KNOWN | {"inputs_digest": "c", "test_accuracy": float("nan")}))
    [result] = read_task_files(tmp_path)[0].values()
    assert (result["title"], result["headlines"], result["test_accuracy"]) == ("Some probe", [], None)
