"""Nodes with real faults of their own, on a real SLURM: they are named and left out, and the job runs on the others."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.slurm.conftest import NODES, Training

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


@contextmanager
def unreachable(training: Training, node: int) -> Iterator[None]:
    """SLURM itself still reaches it: the node answers, but adds no numbers together with any other."""
    rules = [["ipproto", "tcp", end, MEETING_PORTS, "blackhole"] for end in ("dport", "sport")]
    for rule in rules:
        training.cluster.on_node(node, "ip", "rule", "add", *rule)
    try:
        yield
    finally:
        for rule in rules:
            training.cluster.on_node(node, "ip", "rule", "del", *rule)


def test_a_node_that_the_others_do_not_reach(training: Training) -> None:
    with unreachable(training, 2):
        training.submit("--nodes=4", "--ntasks-per-node=1", PREFLIGHT_SECONDS="20")
        check_runs_without_node_2(training, "adds no numbers together with any other node")


def test_two_nodes_that_do_not_meet_are_both_left_out_where_there_are_others(training: Training) -> None:
    with unreachable(training, 2):
        training.submit(PREFLIGHT_SECONDS="15")
        training.check_finishes(restarts=1, starts=1)
    assert "node1 and node2 add no numbers together, and without a third node" in training.log()
    assert not {1, 2} & set(training.nodes())


def test_two_nodes_that_do_not_meet_are_tried_again_where_there_are_no_others(training: Training) -> None:
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
    assert "node2 would be excluded; MAX_EXCLUDED allows 0 nodes" in training.log()
