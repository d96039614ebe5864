"""Nodes with real faults of their own, on a real SLURM: they are named and left out, and the job runs on the others."""

from pathlib import Path

import pytest

from tests.slurm.conftest import Training

pytestmark = pytest.mark.slow
MEETING_PORTS = "20000-32000"
"""Those of jobs of small numbers; SLURM's own lie above."""


def check_runs_without_node_2(training: Training, words: str) -> None:
    training.check_finishes(restarts=1, starts=1)
    job = training.cluster.job(training.job)
    assert job["ExcNodeList"] == "node2"
    assert 2 not in training.nodes()
    assert "preflight: node2 is left out: " in training.log()
    assert words in training.log()


def test_a_node_that_does_not_see_the_shard_set(training: Training, shards: Path) -> None:
    training.cluster.on_node(2, "mount", "-t", "tmpfs", "none", str(shards))
    try:
        training.submit()
        check_runs_without_node_2(training, "has no shards.json")
    finally:
        training.cluster.on_node(2, "umount", str(shards))


def test_a_node_whose_disk_is_full(training: Training) -> None:
    training.run.mkdir()
    training.cluster.on_node(2, "mount", "-t", "tmpfs", "-o", "size=64k", "none", str(training.run))
    try:
        training.submit()
        check_runs_without_node_2(training, "GB are free for the run")
    finally:
        training.cluster.on_node(2, "umount", str(training.run))


def test_a_node_that_the_others_do_not_reach(training: Training) -> None:
    """SLURM itself still does: the node answers, but adds no numbers together with any other."""
    rules = [["ipproto", "tcp", end, MEETING_PORTS, "blackhole"] for end in ("dport", "sport")]
    for rule in rules:
        training.cluster.on_node(2, "ip", "rule", "add", *rule)
    try:
        training.submit("--nodes=4", "--ntasks-per-node=1", PREFLIGHT_SECONDS="20")
        check_runs_without_node_2(training, "adds no numbers together with any other node")
    finally:
        for rule in rules:
            training.cluster.on_node(2, "ip", "rule", "del", *rule)


def test_a_fault_of_all_nodes_is_a_mistake_said_once(training: Training, shards: Path) -> None:
    record = next(shards.glob("train-*.tar"))
    content = record.read_bytes()
    record.write_bytes(content[:-512])
    try:
        training.submit()
        assert training.cluster.until_ended(training.job) == "FAILED"
    finally:
        record.write_bytes(content)
    assert training.log().count("it was truncated or changed (on all of node1, node2).") == 1
    job = training.cluster.job(training.job)
    assert (job["Restarts"], job["ExcNodeList"]) == ("0", "(null)")


def test_a_job_leaves_out_no_more_nodes_than_it_may(training: Training, shards: Path) -> None:
    training.cluster.on_node(2, "mount", "-t", "tmpfs", "none", str(shards))
    try:
        training.submit(MAX_EXCLUDED="0")
        assert training.cluster.until_ended(training.job) == "FAILED"
    finally:
        training.cluster.on_node(2, "umount", str(shards))
    assert "node2 would be left out; MAX_EXCLUDED allows 0 nodes" in training.log()
