"""What a run is warned of before its ranks start."""

import pytest
import torch

from pipeline.config import ModelConfig, ParallelConfig, TrainConfig
from pipeline.distributed import Ranks
from pipeline.train import setup


@pytest.mark.parametrize(
    ("variables", "parts", "warned"),
    [
        ({"LOCAL_WORLD_SIZE": "4"}, 8, True),
        ({"LOCAL_WORLD_SIZE": "6"}, 4, True),
        ({"LOCAL_WORLD_SIZE": "8"}, 8, False),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x4)"}, 8, True),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x4)"}, 2, False),
        ({"LOCAL_WORLD_SIZE": "1"}, 1, False),
        ({}, 8, False),
    ],
)
def test_a_tensor_parallel_group_on_several_nodes(
    variables: dict[str, str],
    parts: int,
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in ("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = TrainConfig(model=ModelConfig(size="s"), parallel=ParallelConfig(tensor_parallel=parts))
    setup.warn_of_slow_groups(config, Ranks(0, 16, 0, torch.device("cpu")))
    assert ("send the activations of every block between nodes" in caplog.text) == warned


@pytest.mark.parametrize(
    ("precision", "slow", "warned"), [("bf16", True, True), ("bf16", False, False), ("fp32", True, False)]
)
def test_a_precision_without_fast_kernels(
    precision: str, slow: bool, warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(setup, "bf16_is_slow", lambda device: slow)
    setup.warn_of_slow_precision(TrainConfig(model=ModelConfig(size="s"), precision=precision), torch.device("cpu"))  # type: ignore[arg-type]
    assert ("no fast kernels" in caplog.text) == warned
