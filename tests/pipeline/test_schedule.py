"""The learning rate against transformers' own schedules."""

import pytest
import torch
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

from pipeline.config import ScheduleConfig
from pipeline.schedule import DECAYS, learning_rate_at


@pytest.mark.parametrize("decay", ["cosine", "constant"])
def test_the_learning_rate_is_transformers_schedule_one_step_on(decay: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.003)
    reference = (
        get_cosine_schedule_with_warmup(optimizer, 10, 100)
        if decay == "cosine"
        else get_constant_schedule_with_warmup(optimizer, 10)
    )
    schedule = ScheduleConfig(steps=100, warmup_steps=10, decay=decay)
    for step in range(1, 101):
        optimizer.step()
        reference.step()
        assert learning_rate_at(step, 0.003, schedule) == pytest.approx(
            reference.get_last_lr()[0], rel=1e-12, abs=1e-18
        )


def test_no_warm_up_starts_at_the_peak() -> None:
    schedule = ScheduleConfig(steps=10, warmup_steps=0, decay="constant")
    assert learning_rate_at(1, 0.5, schedule) == 0.5


def test_a_decay_is_one_function_and_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DECAYS, "halved", lambda step, schedule: 0.5 if step > schedule.steps // 2 else 1.0)
    schedule = ScheduleConfig(steps=10, warmup_steps=2, decay="halved")
    assert [learning_rate_at(step, 4.0, schedule) for step in (1, 2, 5, 6, 10)] == [2.0, 4.0, 4.0, 2.0, 2.0]


def test_an_unknown_decay_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="decay is 'square'; it must be one of cosine, constant"):
        ScheduleConfig(decay="square")
