"""deterministic: true."""

import json

from tests.launch import run
from tests.pipeline.conftest import Runner

SCRIPT = """
import runpy, torch
from pipeline.train import loop
run = loop.Trainer.run
def run_and_print(trainer):
    print("deterministic kernels:", torch.are_deterministic_algorithms_enabled(), flush=True)
    return run(trainer)
loop.Trainer.run = run_and_print
runpy.run_module("tests.pipeline.train.several_runs", run_name="__main__")
"""


def test_a_deterministic_run_trains_draws_and_resumes(runner: Runner) -> None:
    """And computes the losses of an uninterrupted run, bit for bit."""
    settings = {"deterministic": True, "samples__every_steps": 6, "precision": "bf16", "validation__images": 8}
    plans = [("run", {"schedule__steps": 3}), ("run", {"schedule__steps": 6}), ("unbroken", {"schedule__steps": 6})]
    lines = [
        runner.arguments(name, **settings, schedule__decay="constant", schedule__warmup_steps=1, **plan)[3:]
        for name, plan in plans
    ]
    (runner.folder / "runs.json").write_text(json.dumps(lines))
    finished = run(1, "-c", SCRIPT, runner.folder / "runs.json", logs=runner.folder / "logs")
    assert finished.codes == [0], finished.output
    assert finished.output.count("deterministic  torch's deterministic kernels only") == 3
    assert finished.output.count("deterministic kernels: True") == 3
    assert runner.losses("run") == runner.losses("unbroken")
