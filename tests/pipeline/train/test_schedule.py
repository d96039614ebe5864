"""The rate against transformers' own schedules."""

import pytest
import torch
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

from pipeline.config import OptimizerConfig, ScheduleConfig
from pipeline.train.schedule import rate_at


@pytest.mark.parametrize("decay", ["cosine", "constant"])
def test_the_rate_is_transformers_schedule_one_step_on(decay: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.003)
    reference = (
        get_cosine_schedule_with_warmup(optimizer, 10, 100)
        if decay == "cosine"
        else get_constant_schedule_with_warmup(optimizer, 10)
    )
    schedule = ScheduleConfig(steps=100, warmup_steps=10, decay=decay)  # type: ignore[arg-type]
    for step in range(1, 101):
        optimizer.step()
        reference.step()
        assert rate_at(step, OptimizerConfig(learning_rate=0.003), schedule) == pytest.approx(
            reference.get_last_lr()[0], rel=1e-12, abs=1e-18
        )


def test_no_warm_up_starts_at_the_peak() -> None:
    schedule = ScheduleConfig(steps=10, warmup_steps=0, decay="constant")
    assert rate_at(1, OptimizerConfig(learning_rate=0.5), schedule) == 0.5
