"""What the engine over ZeRO decides by itself, without ranks."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.layout import ParallelConfig
from pipeline.train.engine import zero


@pytest.mark.parametrize(
    ("parallel", "use_graph"),
    [({}, True), ({"zero_stage": 2}, True), ({"zero_stage": 3}, False), ({"tensor_parallel": 2}, False)],
)
def test_weights_that_ranks_share_are_not_recorded(
    parallel: dict[str, Any], use_graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def decoder(model: None, positions: int, use_graph: bool) -> Any:
        seen.append(use_graph)
        return lambda so_far: torch.zeros(len(so_far), 3)

    monkeypatch.setattr(zero, "Decoder", decoder)
    engine: Any = SimpleNamespace(
        _engine=SimpleNamespace(eval=lambda: None),
        _divided=lambda positions: nullcontext(),
        _model=None,
        _config=SimpleNamespace(parallel=ParallelConfig(**parallel)),
        _model_config=SimpleNamespace(colors=3),
        _ranks=SimpleNamespace(device=torch.device("cpu")),
    )
    drawn = zero.ZeroEngine.complete(engine, np.zeros((2, 4), np.uint16), samples=5, seed=0)
    assert drawn.shape == (2, 5, 4)
    assert seen == [use_graph]
