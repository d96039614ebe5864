"""The cluster of the other tests: if it fails to start, they must fail, not be skipped."""

import os
from pathlib import Path

import pytest

from tests.slurm import conftest


def executable(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_a_cluster_that_does_not_start_fails_the_tests_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable(tmp_path / "start_cluster.sh", "echo nodes not idle: node3 down >&2; exit 1")
    monkeypatch.setattr(conftest, "CLUSTER_SCRIPTS", tmp_path)
    with pytest.raises(pytest.fail.Exception, match="node3 down"):
        conftest.start_slurm(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="start_cluster.sh requires root")
def test_where_slurm_cannot_be_installed_tests_are_skipped_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable(tmp_path / "unshare", "exit 0")
    executable(tmp_path / "dpkg-query", "exit 1")
    executable(tmp_path / "apt-get", "echo no network; exit 100")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(pytest.skip.Exception, match=r"no network .* slurmctld .* can't be installed"):
        conftest.start_slurm(tmp_path / "cluster")
