"""Failures on a real SLURM: the job ends, is requeued, and the run has the losses of an uninterrupted one."""

import json
import os
import re
import signal

import pytest

from tests.slurm.conftest import Training

pytestmark = pytest.mark.slow
HANG_SECONDS = 20


def test_a_killed_rank(training: Training) -> None:
    training.submit()
    training.await_step(60)
    os.kill(training.ranks()[-1], signal.SIGKILL)
    training.check_finishes(restarts=1)
    assert ": requeue" in training.log()
    assert len((training.run / "failures.jsonl").read_text().splitlines()) == 1


def test_a_node_that_loses_power(training: Training) -> None:
    training.submit()
    training.await_step(60)
    node = training.nodes()[1]
    training.cluster.node("off", node)
    try:
        training.check_finishes(restarts=1)
    finally:
        training.cluster.node("on", node)


@pytest.mark.parametrize("index", [0, 1])
def test_a_node_that_is_cut_off(training: Training, index: int) -> None:
    """The first node has the job's script and the run's first rank, which stay alive there and hold the run's lock."""
    training.submit(overrides={"health__hang_minutes": HANG_SECONDS / 60})
    training.await_step(60)
    node = training.nodes()[index]
    training.cluster.node("unplug", node)
    try:
        training.check_finishes(restarts=1)
    finally:
        training.cluster.node("plug", node)


def test_the_next_job_of_a_chain_waits_for_the_lock_of_a_lost_node(training: Training) -> None:
    """Jobs may not be requeued. The first node, cut off, stays alive and holds the run's lock."""
    overrides = {"health__hang_minutes": 3}  # longer than a busy SLURM takes to give the node up and start the next job
    training.submit("--no-requeue", overrides=overrides, SITE_REQUEUES="false")
    training.await_step(60)
    first, node = training.job, training.nodes()[0]
    training.cluster.node("unplug", node)
    try:
        training.submit(f"--dependency=afterany:{first}", overrides=overrides, SITE_REQUEUES="false")
        training.check_finishes(restarts=0, starts=2)
    finally:
        training.cluster.node("plug", node)
    assert f"SLURM job {first} still holds the lock of the run" in training.log()


def test_a_controller_that_does_not_answer_when_the_job_requeues_itself(training: Training) -> None:
    training.submit()
    training.await_step(60)
    training.cluster.stop_controller()
    (training.run / "STOP").touch()
    training.cluster.until(lambda: "SLURM's controller does not answer" in training.log(), "the first try")
    assert not (training.run / "STOP").exists()
    training.cluster.start_controller()
    training.check_finishes(restarts=1)


def test_a_rank_that_hangs_ends_the_job_with_all_stacks_in_its_log(training: Training) -> None:
    training.submit(overrides={"health__hang_minutes": HANG_SECONDS / 60})
    training.await_step(60)
    stopped = training.ranks()[-1]
    os.kill(stopped, signal.SIGSTOP)
    training.cluster.until(lambda: ": requeue" in training.log(), "the end of the hanging job")
    training.check_finishes(restarts=1)
    log = training.log()
    waited = re.search(r"no progress for (\d+) s: .* not respond \(stopped, dead, or disconnected\)", log)
    assert waited and int(waited[1]) < HANG_SECONDS + 60, "by the configured limit, not the default one"
    assert log.count("in train_step") >= 3  # of the ranks that wait for it
    assert "hang" in json.loads((training.run / "failures.jsonl").read_text())["error"]
