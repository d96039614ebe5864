"""The start of a run: the phases are logged, and garbage collection is on again before the first step."""

import re

import pytest

from tests.launch import run
from tests.pipeline.conftest import Runner

SCRIPT = """
import gc, sys
from data_prep.common.logs import configure_logging
from pipeline.__main__ import train
from pipeline.train import loop
run = loop.Trainer.run
def run_and_print(trainer):
    print("collecting:", gc.isenabled(), flush=True)
    return run(trainer)
loop.Trainer.run = run_and_print
configure_logging()
sys.exit(train(sys.argv[1:]))
"""


def test_a_start_logs_its_phases_and_collects_garbage_from_the_first_step_on(runner: Runner) -> None:
    settings = {"schedule__steps": 2, "schedule__warmup_steps": 0}
    done = run(1, "-c", SCRIPT, *runner.arguments("run", **settings)[3:], logs=runner.folder / "logs", fresh=True)
    assert done.codes == [0], done.output
    assert done.output.count("collecting: True") == 1
    [(total, phases)] = re.findall(r"the first step ended ([\d.]+) s after the command started \((.*)\)", done.output)
    names, seconds = zip(*(phase.rsplit(" ", 1) for phase in phases.split(", ")), strict=True)
    assert (names[0], names[-1]) == ("imports", "first step")
    assert float(total) == pytest.approx(sum(map(float, seconds)), abs=0.05 * (len(seconds) + 1))
