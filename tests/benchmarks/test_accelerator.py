"""The accelerator's benchmark, tried on this machine's CPU at toy size."""

import json
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from pipeline.config import ModelConfig
from pipeline.plan.block_times import read_block_times
from tests.benchmarks.accelerator import PARTS, rates
from tests.benchmarks.models import Case, Step
from tests.launch import ROOT

COMMAND = [sys.executable, "-m", "tests.benchmarks.accelerator"]


@pytest.mark.slow
def test_every_part_gives_its_table_at_toy_size(tmp_path: Path) -> None:
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([*COMMAND, "--toy"], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^## ([\w-]+),", done.stdout, re.MULTILINE) == list(PARTS)
    assert "| colors that differ between cached, replayed completions and full passes | 0 of 128 |" in done.stdout
    assert "| logits in fp32 from float64's | " in done.stdout
    times = tmp_path / "out/accelerator/block_times.json"
    assert len(read_block_times(str(times)).rows) == len(json.loads(times.read_text())["rows"]) == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an accelerator")
def test_without_an_accelerator_it_says_so() -> None:
    done = subprocess.run(COMMAND, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (
        2,
        "error: torch sees no CUDA device; --toy tries the script on this one.\n",
    )


def test_what_does_not_fit_is_gone_before_half_of_it_is_tried() -> None:
    class Engine:
        def __init__(self) -> None:
            self.own = self  # a cycle

    tried: list[tuple[int, weakref.ref[Engine]]] = []

    def make(case: Case) -> Step:
        assert all(engine() is None for _, engine in tried)
        engine = Engine()
        tried.append((case.images, weakref.ref(engine)))
        if case.images > 2:
            raise torch.OutOfMemoryError("too large")
        return lambda: sum(range(10_000))

    found = Case(ModelConfig(layers=1, width=8, heads=1), 8, "fp32", torch.device("cpu"))
    for _ in range(2):  # the second time after one that fitted
        found, rate = rates(found, make)
        assert (found.images, rate > 0) == (2, True)
    assert [images for images, _ in tried] == [8, 4, 2, 2]
