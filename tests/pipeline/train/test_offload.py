"""Optimizer state and weights in the host's memory: the same curve, exact resumes, checkpoints like all others."""

import shutil
from pathlib import Path

import pytest

from tests.launch import run
from tests.pipeline.conftest import Runner
from tests.pipeline.train.test_topologies import FP32_TOLERANCE, RATE

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="DeepSpeed compiles its Adam for the host, which needs g++"
)


@needs_compiler
@pytest.mark.slow  # a minute where DeepSpeed's Adam is compiled for the first time
@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, {"parallel__offload": "optimizer"}),
        (2, {"parallel__offload": "optimizer", "parallel__zero_stage": 2}),
        (2, {"parallel__offload": "parameters", "parallel__zero_stage": 3}),
        (2, {"parallel__offload": "optimizer", "parallel__pipeline_stages": 2}),
        (2, {"parallel__offload": "optimizer", "parallel__tensor_parallel": 2}),
    ],
)
def test_offloaded_is_as_one_rank_and_resumes_bit_for_bit(
    runner: Runner, ranks: int, settings: dict[str, object]
) -> None:
    common = {"optimizer__learning_rate": RATE, "batch__micro_size": 2, "schedule__decay": "constant"}
    runner.check_trains("one", 1, **common, schedule__steps=14)
    runner.check_trains("whole", ranks, **common, **settings, schedule__steps=14)
    assert runner.losses("whole") == pytest.approx(runner.losses("one"), abs=FP32_TOLERANCE)
    runner.check_trains("resumed", ranks, **common, **settings, schedule__steps=7)
    shutil.copytree(runner.folder / "resumed", runner.folder / "moved")
    runner.check_trains("resumed", ranks, **common, **settings, schedule__steps=14)
    assert runner.losses("resumed") == runner.losses("whole")
    plain = {"parallel__offload": "none", "parallel__zero_stage": 1, "parallel__pipeline_stages": 1}
    runner.check_trains("moved", 1, **common, **plain, parallel__tensor_parallel=1, schedule__steps=14)
    assert runner.losses("moved") == pytest.approx(runner.losses("whole"), abs=FP32_TOLERANCE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"parallel__zero_stage": 0},
            "parallel.zero_stage is 0; with parallel.offload optimizer it must be at least 1",
        ),
        ({"parallel__offload": "parameters"}, "parallel.zero_stage is 1; with parallel.offload parameters it must be"),
    ],
)
def test_mistakes_are_said(runner: Runner, settings: dict[str, object], message: str) -> None:
    finished = runner.train("run", 1, **{"parallel__offload": "optimizer", **settings})
    assert finished.codes == [2]
    assert message in finished.output


def test_a_machine_without_compiler_is_told_so(runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    finished = run(1, *runner.arguments("run", parallel__offload="optimizer"), logs=tmp_path / "logs")
    assert finished.codes == [2]
    assert "parallel.offload is optimizer; DeepSpeed compiles the Adam it needs, and g++ is not" in finished.output
    assert not (runner.folder / "run").exists()
