"""Faulty nodes on a real SLURM: the job names and excludes them, and runs on the others."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.slurm.conftest import NODES, Training

pytestmark = pytest.mark.slow
HEALTH_CHECK_PORTS = "20000-32000"
"""Ports of the all-reduces of jobs with small numbers; SLURM's own ports are higher."""


def check_runs_without_node_2(training: Training, words: str) -> None:
    training.check_finishes(restarts=1, starts=1)
    job = training.cluster.job(training.job)
    assert job["ExcNodeList"] == "node2"
    assert 2 not in training.nodes()
    assert "preflight: node2 is excluded: " in training.log()
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


@contextmanager
def unreachable(training: Training, node: int) -> Iterator[None]:
    """SLURM itself still reaches the node, but each all-reduce with another node fails."""
    rules = [["ipproto", "tcp", end, HEALTH_CHECK_PORTS, "blackhole"] for end in ("dport", "sport")]
    for rule in rules:
        training.cluster.on_node(node, "ip", "rule", "add", *rule)
    try:
        yield
    finally:
        for rule in rules:
            training.cluster.on_node(node, "ip", "rule", "del", *rule)


def test_a_node_that_the_other_nodes_do_not_reach(training: Training) -> None:
    with unreachable(training, 2):
        training.submit("--nodes=4", "--ntasks-per-node=1", PREFLIGHT_SECONDS="20")
        check_runs_without_node_2(training, "the all-reduce fails with each of its neighbors")


def test_two_disconnected_nodes_are_both_excluded_if_there_are_enough_others(training: Training) -> None:
    with unreachable(training, 2):
        training.submit(PREFLIGHT_SECONDS="15")
        training.check_finishes(restarts=1, starts=1)
    assert "the all-reduce between node1 and node2 fails, and without a third node" in training.log()
    assert not {1, 2} & set(training.nodes())


def test_two_disconnected_nodes_are_retried_if_there_are_no_others(training: Training) -> None:
    others = f"NodeName={','.join(f'node{number}' for number in range(3, NODES + 1))}"
    training.cluster.client("scontrol", "update", others, "State=DRAIN", "Reason=test")
    try:
        with unreachable(training, 2):
            training.submit(PREFLIGHT_SECONDS="15", MAX_FAILURES="2")
            assert training.cluster.until_ended(training.job) == "FAILED"
    finally:
        training.cluster.client("scontrol", "update", others, "State=RESUME")
    job = training.cluster.job(training.job)
    assert (job["Restarts"], job["ExcNodeList"]) == ("1", "(null)")
    assert "it failed 2 times at step 0, which is MAX_FAILURES" in training.log()


def test_a_fault_of_all_nodes_is_a_user_error_reported_once(training: Training, shards: Path) -> None:
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


def test_a_job_excludes_at_most_max_excluded_nodes(training: Training, shards: Path) -> None:
    training.cluster.on_node(2, "mount", "-t", "tmpfs", "none", str(shards))
    try:
        training.submit(MAX_EXCLUDED="0")
        assert training.cluster.until_ended(training.job) == "FAILED"
    finally:
        training.cluster.on_node(2, "umount", str(shards))
    assert "node2 would be excluded; MAX_EXCLUDED allows 0 nodes" in training.log()
