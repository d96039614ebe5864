"""The learning rate against transformers' own schedules."""

from typing import Any, Literal

import pytest
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from pipeline.config import ScheduleConfig
from pipeline.schedule import DECAYS, learning_rate_at


def of_transformers(decay: str, shape: str, optimizer: Optimizer) -> LambdaLR:
    """10 steps of warm-up, 100 in all; wsd decays over the last 30."""
    if decay == "cosine":
        return get_cosine_schedule_with_warmup(optimizer, 10, 100)
    if decay == "linear":
        return get_linear_schedule_with_warmup(optimizer, 10, 100)
    if decay == "constant":
        return get_constant_schedule_with_warmup(optimizer, 10)
    return get_wsd_schedule(optimizer, 10, 30, 100, decay_type={"linear": "linear", "sqrt": "1-sqrt"}[shape])


@pytest.mark.parametrize(
    ("decay", "shape"),
    [("cosine", "linear"), ("linear", "linear"), ("constant", "linear"), ("wsd", "linear"), ("wsd", "sqrt")],
)
def test_the_learning_rate_is_transformers_schedule_one_step_on(decay: str, shape: Literal["linear", "sqrt"]) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.003)
    reference = of_transformers(decay, shape, optimizer)
    decay_steps = 30 if decay == "wsd" else None
    schedule = ScheduleConfig(steps=100, warmup_steps=10, decay=decay, decay_steps=decay_steps, decay_shape=shape)
    for step in range(1, 101):
        optimizer.step()
        reference.step()
        assert learning_rate_at(step, 0.003, schedule) == pytest.approx(
            reference.get_last_lr()[0], rel=1e-12, abs=1e-18
        )


def test_twelve_steps_of_a_run_and_its_decay_branch_by_hand() -> None:
    """Two steps of warm-up, four of decay; the branch is a run of its own that begins after step 8."""
    complete = ScheduleConfig(steps=12, warmup_steps=2, decay="wsd", decay_steps=4)
    branch = ScheduleConfig(steps=4, warmup_steps=0, decay="linear")
    decay = [0.75, 0.5, 0.25, 0.0]
    assert [learning_rate_at(step, 1.0, complete) for step in range(1, 13)] == [0.5, *7 * [1.0], *decay]
    assert [learning_rate_at(step, 1.0, branch) for step in range(1, 5)] == decay


def test_no_warm_up_starts_at_the_peak() -> None:
    schedule = ScheduleConfig(steps=10, warmup_steps=0, decay="constant")
    assert learning_rate_at(1, 0.5, schedule) == 0.5


def test_a_decay_is_one_function_and_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DECAYS, "halved", lambda step, schedule: 0.5 if step > schedule.steps // 2 else 1.0)
    schedule = ScheduleConfig(steps=10, warmup_steps=2, decay="halved")
    assert [learning_rate_at(step, 4.0, schedule) for step in (1, 2, 5, 6, 10)] == [2.0, 4.0, 4.0, 2.0, 2.0]


def test_an_unknown_decay_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="decay is 'square'; it must be one of cosine, linear, constant, wsd"):
        ScheduleConfig(decay="square")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": "wsd"}, "decay_steps is null; with schedule.decay wsd it must be from 1 to 90, the steps after the"),
        ({"decay": "wsd", "decay_steps": 91}, "decay_steps is 91; with schedule.decay wsd it must be from 1 to 90,"),
        ({"decay": "wsd", "decay_steps": 0}, "decay_steps is 0; with schedule.decay wsd it must be from 1 to 90,"),
        ({"decay_steps": 10}, "decay_steps is 10; schedule.decay is cosine, and only wsd uses it."),
        ({"decay_shape": "sqrt"}, "decay_shape is sqrt; schedule.decay is cosine, and only wsd uses it."),
    ],
)
def test_decay_steps_belong_to_wsd(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^schedule.{message}"):
        ScheduleConfig(steps=100, warmup_steps=10, **settings)
