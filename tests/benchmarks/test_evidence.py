"""`make evidence`: its jobs, their processes, and the sentences about what came out."""

import os
import shutil
import signal
import sys
import time
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import pytest

from data_prep.common.files import read_json, write_json
from tests.benchmarks.evidence.findings import at_equal_loss, sentences, write_findings
from tests.benchmarks.evidence.jobs import BATCH, SIZES, Job, Places, all_jobs, branch_step, lengths, trained_steps
from tests.benchmarks.evidence.workers import Workers
from tests.golden.curves import SHARDS
from tests.launch import run
from tests.pipeline.conftest import Runner

PYTHON = (sys.executable, "-c")
STOPPED = """
import sys
from pathlib import Path
from tests.benchmarks.evidence.jobs import Job
from tests.benchmarks.evidence.workers import Workers
jobs = [Job("long", ("import time; time.sleep(120)",)), Job("later", ("pass",))]
sys.exit(Workers(Path(sys.argv[1]), 1, (sys.executable, "-c")).run(jobs))
"""


def test_every_job_comes_after_what_it_needs_and_branches_begin_at_checkpoints() -> None:
    jobs = all_jobs(Places(Path("shards"), Path("out")), 256_000)
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    for place, job in enumerate(jobs):
        assert set(job.needs) <= set(names[:place]), job.name
    assert not any(branch_step(images) % 400 for images in lengths(256_000))
    assert all(images % BATCH == 0 for images in lengths(256_000))
    assert trained_steps(jobs[0].arguments) == 6400
    assert all(path.is_file() for job in jobs for path in job.inputs if path.suffix == ".yaml")


@pytest.mark.parametrize("images", [50_000, 16_000])
def test_a_length_that_no_branch_has_is_an_error(images: int) -> None:
    with pytest.raises(ValueError, match=f"--images is {images}; it must be 16000 times 2, 4, 8 and so on"):
        lengths(images)


def test_a_job_runs_once_until_its_arguments_change(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    once, again = (f"open({str(ran)!r}, 'a').write({text!r})" for text in "ab")
    jobs, before = [Job("one", (once,)), Job("two", ("pass",), ("one",))], signal.getsignal(signal.SIGINT)
    assert Workers(tmp_path, 2, PYTHON).run(jobs) == os.EX_OK
    assert Workers(tmp_path, 2, PYTHON).run(jobs) == os.EX_OK and ran.read_text() == "a"
    first = read_json(tmp_path / "done/one.json")["cpu_seconds"]
    assert Workers(tmp_path, 2, PYTHON).run([Job("one", (again,))]) == os.EX_OK and ran.read_text() == "ab"
    assert read_json(tmp_path / "done/one.json")["cpu_seconds"] > first > 0, "of all attempts"
    assert signal.getsignal(signal.SIGINT) == before


def test_a_failure_ends_the_command_after_what_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With the real command: its last line says what was wrong."""
    bad, other = Job("bad", ("status", str(tmp_path / "no_run"))), Job("other", ("plan", "--help"))
    assert Workers(tmp_path, 2).run([bad, other, Job("after", ("plan", "--help"), ("bad",))]) == 1
    error = capfd.readouterr().err
    assert error.startswith("error: bad ended with code 2; see") and "no_run" in error
    assert read_json(tmp_path / "done/other.json")["finished"] and not (tmp_path / "done/after.json").exists()


def test_children_that_end_together_are_all_recorded(tmp_path: Path) -> None:
    jobs = [Job(str(number), ("pass",)) for number in range(12)]
    assert Workers(tmp_path, 6, PYTHON).run(jobs) == os.EX_OK
    assert all(read_json(tmp_path / f"done/{job.name}.json")["finished"] for job in jobs)


def test_a_changed_recipe_is_refused_and_a_changed_comment_is_not(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 0  # as in the paper\n")
    job = Job("run", ("pass",), inputs=(recipe,))
    assert Workers(tmp_path, 1, PYTHON).run([job]) == os.EX_OK
    recipe.write_text("seed: 0\n")
    assert Workers(tmp_path, 1, PYTHON).run([job]) == os.EX_OK
    recipe.write_text("seed: 1\n")
    with pytest.raises(ValueError, match=r"run was run with another recipe or shard set than .*recipe.yaml; restore"):
        Workers(tmp_path, 1, PYTHON).run([job])


def test_a_stop_is_passed_on_and_the_rest_stays_open(tmp_path: Path) -> None:
    program = Popen([sys.executable, "-c", STOPPED, str(tmp_path)], stdout=PIPE, text=True)
    assert program.stdout is not None
    while "started  long" not in program.stdout.readline():
        assert program.poll() is None
    time.sleep(0.5)  # for its interpreter
    program.send_signal(signal.SIGTERM)
    assert "stopped; the same command continues" in program.stdout.read()
    assert program.wait() == os.EX_TEMPFAIL
    assert not read_json(tmp_path / "done/long.json")["finished"]
    assert not (tmp_path / "done/later.json").exists()


def finished(name: str, images: int, loss: float, ridge: float) -> dict[str, Any]:
    return {"name": name, "images": images, "valid_loss": loss, "ridge": ridge, "accuracy_by_layer": [0.3, 0.45, 0.4]}


def test_sentences_say_what_came_out_either_way() -> None:
    ends = {"next_color_0.1m": (3.0, 0.40), "next_color_0.4m": (2.9, 0.42), "next_color_1.3m": (2.8, 0.41),
            "next_color_2.9m": (2.7, 0.50)}  # fmt: skip
    models = [
        finished(name, images, loss + worse, ridge - worse / 10)
        for name, (loss, ridge) in ends.items()
        for images, worse in ((32_000, 0.4), (64_000, 0.0))
    ]
    models.append(finished("next_color_0.1m-seed1", 64_000, 3.01, 0.39))
    points = [{"name": one["name"], "valid_loss": one["valid_loss"], "accuracy": one["ridge"]} for one in models[:-1]]
    held_out = {"predicted": {"value": 2.71, "low": 2.6, "high": 2.8}, "run": "big", "measured": 2.7, "error": 0.0037}
    found = dict(sentences(models, points, {}, 64_000, held_out))
    depth = found["accuracy by depth, valid"] or ""
    assert "next_color_1.3m: best at layer 1 of 2, 15.0 points above the first, 5.0 above the last" in depth
    assert (
        found["accuracy against loss"] == "rank correlation over all 8 probes -0.81"
    )  # 1 - 6 * 152 / (8 * 63), by hand
    assert found["scaling law"] == (
        "of the other sizes, predicts 2.7100 (95%: 2.6 to 2.8) for big, measured 2.7000: error +0.37%"
    )
    assert found["masked against next color, fine-tuned"] is None
    assert found["second seeds"] == (
        "next_color_0.1m-seed1: loss +0.0100, ridge probe -1.0 points against seed 0"
    )  # fmt: skip
    assert at_equal_loss(models) == (
        "at 3.000 nats next_color_0.1m 40.0 %, next_color_0.4m 41.0 %, next_color_1.3m 39.0 %, next_color_2.9m 47.0 %"
    )
    far = [one | {"valid_loss": one["valid_loss"] - 1} if "2.9m" in one["name"] else one for one in models]
    assert at_equal_loss(far) == "there is no loss that all sizes passed"


def test_findings_are_read_from_what_the_commands_write(tmp_path: Path) -> None:
    """A run and its evaluation by the real commands, in the place of one model's."""
    places, model = Places(SHARDS, tmp_path), SIZES[0]
    branch, results = places.branch(model, 32_000), places.results(model, 32_000)
    runner = Runner(SHARDS, branch.parent)
    settings = {"schedule__steps": 6, "probe__every_steps": 6, "probe__train_images": 40, "probe__test_images": 8}
    trained = runner.train(branch.name, **settings)
    assert trained.codes == [0], trained.output
    words = ("-m", "pipeline", "evaluate", branch, "--shards", SHARDS, "--tasks", "linear_probe", "--out")
    for options in ((results / "random_weights", "--weights", "random"), (results,)):
        done = run(1, *words, *options, logs=tmp_path / "logs")
        assert done.codes == [0], done.output
    write_findings(places, [16_000, 32_000], 7200.0)
    [found] = read_json(tmp_path / "findings.json")["models"]
    probe = read_json(results / "linear_probe.json")
    rows = runner.rows(branch.name)
    assert found["probe"] == probe["test_accuracy"] and found["random"] is not None
    assert found["valid_loss"] == [row["valid_loss"] for row in rows if "valid_loss" in row][-1]
    assert found["ridge"] == [row["probe_accuracy"] for row in rows if "probe_accuracy" in row][-1]
    assert found["accuracy_by_layer"] == probe["valid_accuracy_by_layer"]
    page = (tmp_path / "findings.md").read_text()
    assert f"| {model.name} | {found['parameters']:,} | 32,000 | {found['valid_loss']:.4f} |" in page
    assert "scaling law: not measured yet" in page and "cost: 2.0 CPU-hours" in page
    assert (tmp_path / "accuracy_by_depth.png").stat().st_size > 5000
    shutil.rmtree(results)
    write_json(branch / "run.json", {})
    write_findings(places, [16_000, 32_000], 0.0)
    assert read_json(tmp_path / "findings.json")["models"][0]["probe"] is None
