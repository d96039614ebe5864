"""Compiled blocks: the same curve as plain torch, and checkpoints that resume without compiling."""

import re
import shutil

import pytest
import torch

from pipeline.train.engine.build import check_torch_compiles
from tests.pipeline.conftest import Runner
from tests.pipeline.train.engine.test_topologies import BF16_TOLERANCE, FP32_TOLERANCE, RATE, train_plainly

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on CPU needs g++")

TP2 = {"parallel__tensor_parallel": 2, "batch__micro_size": 2}


@pytest.fixture(scope="module")
def plain_losses(shards):
    return train_plainly(shards)


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (1, {}),
        pytest.param(1, {"parallel__recompute": True}, marks=pytest.mark.slow),
        pytest.param(2, {"parallel__zero_stage": 2}, marks=pytest.mark.slow),
        pytest.param(2, {"parallel__zero_stage": 3}, marks=pytest.mark.slow),
        pytest.param(2, {"parallel__zero_stage": 3, "parallel__recompute": True}, marks=pytest.mark.slow),
        pytest.param(2, {"parallel__zero_stage": 3, "parallel__offload": "parameters"}, marks=pytest.mark.slow),
        pytest.param(2, {"parallel__pipeline_stages": 2, "batch__micro_size": 2}, marks=pytest.mark.slow),
        pytest.param(2, TP2, marks=pytest.mark.slow),
        pytest.param(2, {**TP2, "parallel__sequence_parallel": False}, marks=pytest.mark.slow),
        pytest.param(2, {**TP2, "parallel__recompute": True}, marks=pytest.mark.slow),
        pytest.param(4, {**TP2, "parallel__pipeline_stages": 2}, marks=pytest.mark.slow),
    ],
)
def test_fp32_losses_are_those_of_plain_torch(
    runner: Runner, plain_losses: list[float], ranks: int, settings: dict[str, object]
) -> None:
    finished = runner.train("run", ranks, compile=True, optimizer__learning_rate=RATE, **settings)
    assert finished.codes == [0] * ranks, "\n".join(finished.outputs)
    assert runner.losses("run") == pytest.approx(plain_losses, abs=FP32_TOLERANCE)
    assert "compile   each block" in finished.output
    for sign_of_trouble in ("compiled a block again", "torch._dynamo hit"):  # neither in steps, validation nor saves
        assert sign_of_trouble not in finished.output


@pytest.mark.slow
def test_bf16_losses_stay_near(runner: Runner, plain_losses: list[float]) -> None:
    runner.check_trains("run", 1, compile=True, optimizer__learning_rate=RATE, precision="bf16")
    assert runner.losses("run") == pytest.approx(plain_losses, abs=BF16_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"objective__kind": "masked_color"}, {"model__block": "gpt2"}])
def test_a_run_started_compiled_resumes_without(runner: Runner, settings: dict[str, object]) -> None:
    settings = settings | {"optimizer__learning_rate": RATE}
    runner.check_trains("plain", 1, **settings)
    runner.check_trains("run", 1, **settings, compile=True, schedule__steps=40, checkpoint__every_steps=20)
    assert runner.losses("run") == pytest.approx(runner.losses("plain"), abs=FP32_TOLERANCE)
    runner.check_trains("run", 1, **settings, schedule__steps=45)
    assert len(runner.losses("run")) == 45


def test_without_a_compiler_it_is_an_error(runner: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    finished = runner.train("run", compile=True)
    assert finished.codes == [2]
    assert finished.output.count("\n") == 1
    assert "compile is true; torch.compile needs a C++ compiler" in finished.output
    assert not (runner.folder / "run").exists()


@pytest.mark.parametrize(
    ("device", "there", "named", "missing"),
    [
        ("cpu", ["g++"], {}, None),
        ("cpu", ["clang++"], {}, "g++"),  # for which torch does not look by itself
        ("cpu", ["clang++"], {"CXX": "clang++"}, None),
        ("cpu", ["g++"], {"CXX": "icpx"}, "icpx"),
        ("cuda", ["clang"], {}, None),
        ("cuda", ["g++"], {}, "gcc or clang"),
        ("cuda", ["gcc"], {"CC": "icx"}, "icx"),
    ],
)
def test_the_compiler_looked_for_is_the_one_that_torch_takes(
    device: str, there: list[str], named: dict[str, str], missing: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    for name in there:
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    for variable, name in named.items():
        monkeypatch.setenv(variable, name)
    if missing is None:
        check_torch_compiles(torch.device(device))
        return
    with pytest.raises(ValueError, match=f"and {re.escape(missing)} is not on PATH"):
        check_torch_compiles(torch.device(device))
