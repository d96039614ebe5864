"""Files by which users ask for something: one rank looks for them, once a second."""

from pathlib import Path

import pytest

from pipeline.train.health import stop


class Watched:
    """A path that counts how often it is looked for."""

    looks = 0

    def exists(self) -> bool:
        self.looks += 1
        return True


def test_a_file_is_looked_for_once_a_second_by_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(stop.time, "monotonic", lambda: now[0])
    path: object = Watched()
    first, other = stop.RequestFile(path, checks=True), stop.RequestFile(path, checks=False)  # type: ignore[arg-type]
    found = []
    for _ in range(10):
        found.append(first.found())
        assert not other.found()
        now[0] += 0.25
    assert path.looks == 3  # type: ignore[attr-defined]
    assert [number for number, there in enumerate(found) if there] == [0, 4, 8]


def test_the_rank_that_looks_deletes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "STOP"
    path.touch()
    stop.RequestFile(path, checks=False).delete()
    assert path.exists()
    stop.RequestFile(path, checks=True).delete()
    assert not path.exists()
