"""`make evidence`: its jobs, their processes, and the sentences about what came out."""

import os
import signal
import sys
import time
from pathlib import Path
from subprocess import PIPE, Popen

import pytest

from data_prep.common.files import read_json
from tests.benchmarks.evidence.findings import at_equal_loss, sentences
from tests.benchmarks.evidence.jobs import BATCH, SIZES, Job, Places, all_jobs, branch_step, lengths
from tests.benchmarks.evidence.workers import Workers

STOPPED = """
import sys
from pathlib import Path
from tests.benchmarks.evidence.jobs import Job
from tests.benchmarks.evidence.workers import Workers
sys.exit(Workers(Path(sys.argv[1]), 1).run([Job("long", ("search", "--help")), Job("later", ("train", "--help"))]))
"""


def test_every_job_comes_after_what_it_needs_and_branches_begin_at_checkpoints():
    jobs = all_jobs(Places(Path("shards"), Path("out")), 256_000)
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    for number, job in enumerate(jobs):
        assert set(job.needs) <= set(names[:number]), job.name
    assert not any(branch_step(images) % 400 for images in lengths(256_000))
    assert all(images % BATCH == 0 for images in lengths(256_000))


def test_a_length_that_no_branch_has_is_an_error():
    with pytest.raises(ValueError, match="--images is 50000; it must be 16000 times a power of two, such as 64000"):
        lengths(50_000)


def test_a_job_runs_once_until_its_words_change_and_a_failed_one_ends_all(tmp_path, capfd):
    good, changed = Job("help", ("plan", "--help")), Job("help", ("status", "--help"))
    assert Workers(tmp_path, 2).run([good, Job("next", ("search", "--help"), ("help",))]) == os.EX_OK
    log = tmp_path / "logs" / "help.log"
    size = log.stat().st_size
    assert Workers(tmp_path, 2).run([good]) == os.EX_OK and log.stat().st_size == size
    assert Workers(tmp_path, 2).run([changed]) == os.EX_OK and log.stat().st_size > size
    assert read_json(tmp_path / "done" / "help.json")["cpu_seconds"] > 0
    bad = Job("bad", ("status", str(tmp_path / "no_run")))
    assert Workers(tmp_path, 1).run([bad, Job("after", ("plan", "--help"), ("bad",))]) == 1
    assert "error: bad ended with code 2; see" in capfd.readouterr().err
    assert not (tmp_path / "done" / "after.json").exists()


def test_a_stop_is_passed_on_and_the_rest_stays_open(tmp_path):
    program = Popen([sys.executable, "-c", STOPPED, str(tmp_path)], stdout=PIPE, text=True)
    assert program.stdout is not None
    while "started  long" not in program.stdout.readline():
        assert program.poll() is None
    time.sleep(0.05)
    program.send_signal(signal.SIGTERM)
    assert "stopped; the same command continues" in program.stdout.read()
    assert program.wait() == os.EX_TEMPFAIL
    assert not (tmp_path / "done" / "later.json").exists()


def test_sentences_say_what_came_out_either_way():
    curves = {"next_color_0.1m": (3.0, 0.40), "next_color_0.4m": (2.9, 0.42), "next_color_1.3m": (2.8, 0.41),
              "next_color_2.9m": (2.7, 0.50)}  # fmt: skip
    points = [
        {"name": name, "run": name, "step": step, "valid_loss": loss + worse, "accuracy": accuracy - worse / 10}
        for name, (loss, accuracy) in curves.items()
        for step, worse in ((1, 0.4), (2, 0.0))
    ]
    longest = {
        model.name: {"name": model.name, "ridge": curves[model.name][1], "accuracy_by_layer": [0.3, 0.45, 0.4]}
        for model in SIZES
    }
    held_out = {"predicted": {"value": 2.71}, "run": "next_color_2.9m-64000", "measured": 2.70, "error": 0.0037}
    found = dict(sentences(longest, points, {"raw pixels": 0.38}, held_out))
    assert "next_color_1.3m: best at layer 1 of 2, 15.0 points above the first, 5.0 above the last" in found[
        "accuracy by depth"
    ]  # fmt: skip
    assert found["accuracy against loss"] == "rank correlation -0.81 over 8 probes"
    assert found["scaling law"].endswith("error +0.37%")
    assert not found["masked against next color, fine-tuned"] and "fine-tuning" not in found
    loss, accuracies = at_equal_loss(points) or (0.0, {})
    assert loss == 3.0 and accuracies["next_color_0.1m"] == pytest.approx(0.40)
    assert accuracies["next_color_2.9m"] == pytest.approx(0.50 - 0.03)
    far = [point | {"valid_loss": point["valid_loss"] - 1} if "2.9m" in point["name"] else point for point in points]
    assert at_equal_loss(far) is None, "a size that was never that bad has no accuracy at that loss"
