"""The start of a run: the phases are logged, garbage collection is on again before the first step, and torch's compiler
is not imported."""

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
    print("Inductor:", "torch._inductor.compile_fx" in sys.modules, flush=True)
    return run(trainer)
loop.Trainer.run = run_and_print
configure_logging()
sys.exit(train(sys.argv[1:]))
"""


def test_a_start_logs_its_phases_collects_garbage_and_imports_no_compiler(runner: Runner) -> None:
    settings = {"schedule__steps": 2, "schedule__warmup_steps": 0}
    done = run(1, "-c", SCRIPT, *runner.arguments("run", **settings)[3:], logs=runner.folder / "logs", fresh=True)
    assert done.codes == [0], done.output
    assert done.output.count("collecting: True") == 1
    assert done.output.count("Inductor: False") == 1
    [(total, phases)] = re.findall(r"the first step ended ([\d.]+) s after the command started \((.*)\)", done.output)
    names, seconds = zip(*(phase.rsplit(" ", 1) for phase in phases.split(", ")), strict=True)
    assert (names[0], names[-1]) == ("imports", "first step")
    assert float(total) == pytest.approx(sum(map(float, seconds)), abs=0.05 * (len(seconds) + 1))
