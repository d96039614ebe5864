"""The learning rate as a pure function of the step (contract 8)."""

from math import cos, pi

from pipeline.config import OptimizerConfig, ScheduleConfig


def rate_at(step: int, optimizer: OptimizerConfig, schedule: ScheduleConfig) -> float:
    """Rate of the update that makes step - 1 into step; step counts from 1.

    Linear from 0 over the warm-up, then a half cosine to 0 at the last step, or constant.
    """
    peak = optimizer.learning_rate
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if schedule.decay == "constant":
        return peak
    progress = (step - schedule.warmup_steps) / (schedule.steps - schedule.warmup_steps)
    return peak * 0.5 * (1 + cos(pi * progress))
