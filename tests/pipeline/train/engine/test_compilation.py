"""What surrounds torch.compile: when it is used, its workers under signals, evaluation without it, recompilations."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.command_line import parse_training
from pipeline.config import ModelConfig, TrainConfig
from pipeline.train.engine import compilation
from tests.launch import run

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def config(compile: Any) -> TrainConfig:
    return TrainConfig(model=ModelConfig(size="s"), compile=compile)


@pytest.mark.parametrize(
    ("chosen", "device", "compiler", "on"),
    [
        ("auto", CUDA, True, True),
        ("auto", CUDA, False, False),
        ("auto", CPU, True, False),
        (True, CPU, True, True),
        (False, CUDA, True, False),
    ],
)
def test_auto_compiles_on_accelerators_that_have_a_compiler(
    chosen: Any, device: torch.device, compiler: bool, on: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    if compiler:
        (tmp_path / "gcc").touch(mode=0o755)
    assert compilation.is_on(config(chosen), device) is on
    described = compilation.describe(config(chosen), device)
    assert described.startswith("each block" if on else "off")
    assert ("gcc or clang is not on PATH" in described) is (device is CUDA and not compiler)


@pytest.mark.parametrize(
    ("words", "value"), [([], "auto"), (["--compile", "true"], True), (["--compile=false"], False)]
)
def test_the_option_is_a_truth_value_or_auto(words: list[str], value: object, tmp_path: Path) -> None:
    parsed, _ = parse_training(["--run", str(tmp_path / "run"), "--model.size", "s", *words])
    assert parsed.compile == value and type(parsed.compile) is type(value)
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.yaml").write_text("model: {size: s}\ncompile: true\n")  # as earlier versions wrote it
    assert parse_training(["--run", str(tmp_path / "old")])[0].compile is True


def test_another_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compile is 'always'; it must be true or false or auto"):
        parse_training(["--run", str(tmp_path / "run"), "--model.size", "s", "--compile", "always"])


@pytest.mark.slow  # starts interpreters of torch's own
def test_the_workers_outlive_signals_to_all_processes_of_a_job(tmp_path: Path) -> None:
    """The program has a process group of its own, and only remembers the signals, as a rank does."""
    finished = run(1, "-c", SIGNALLED, logs=tmp_path)
    assert finished.output.split() == ["42", "42", "open"]


SIGNALLED = """
import os, signal, time, torch
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from pipeline.train.engine import compilation
from pipeline.stop_signals import STOP_SIGNALS

config.compile_threads = 2

for number in STOP_SIGNALS:
    signal.signal(number, lambda *_: None)
compilation.start_workers(torch.device("cuda"))

def compile_elsewhere():
    return AsyncCompile.process_pool().submit(abs, -42).result(timeout=60)

print(compile_elsewhere())
for number in STOP_SIGNALS:
    os.killpg(0, number)
time.sleep(0.5)
print(compile_elsewhere())
print("closed" if signal.pthread_sigmask(signal.SIG_BLOCK, []) else "open")
os._exit(0)
"""


def test_a_recompilation_is_reported_once_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    watch, double = compilation.RecompileWatch(), torch.compile(lambda x: 2 * x, backend="eager", dynamic=False)
    watch.check()
    watch.count = 0  # of what other tests compiled
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        double(torch.zeros(2))
        watch.check()
        assert (watch.count, caplog.messages) == (0, [])
        double(torch.zeros(3))
        watch.check()
        double(torch.zeros(4))
        watch.check()
    assert watch.count == 2
    [message] = caplog.messages
    assert "torch.compile compiled a block again" in message and "size mismatch" in message


def test_what_runs_eagerly_compiles_nothing() -> None:
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append("compiled")
        return graph

    torch._dynamo.reset()
    layer = nn.Linear(2, 2)
    layer.forward = torch.compile(layer.forward, backend=backend, dynamic=False)  # type: ignore[method-assign]
    with compilation.eagerly(), torch.no_grad():
        layer(torch.zeros(1, 2))
    assert seen == []
    layer(torch.zeros(3, 2))
    with compilation.eagerly(), torch.no_grad():
        layer(torch.zeros(1, 2))
    layer(torch.zeros(3, 2))
    assert seen == ["compiled"]
