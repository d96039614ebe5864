"""What an evaluation logs of the values that a task tried."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.evaluate.options import (
    AttentiveProbeOptions,
    FineTuneOptions,
    KnnOptions,
    LinearProbeOptions,
    LowDataOptions,
    SgdOptions,
)
from pipeline.evaluate.task import Task
from pipeline.evaluate.tasks.attentive_probe import AttentiveProbe
from pipeline.evaluate.tasks.fine_tune import FineTune
from pipeline.evaluate.tasks.knn import KNN
from pipeline.evaluate.tasks.linear_probe import LinearProbe
from pipeline.evaluate.tasks.low_data import LowData


@pytest.mark.parametrize(
    ("tried", "chosen", "logged"),
    [
        ([1.0, 0.1, 0.01], [0.01], ["x: 0.01, the smallest that was tried, is the best; try smaller ones too"]),
        ([10, 20, 100], [100], ["x: 100, the largest that was tried, is the best; try larger ones too"]),
        (
            [1.0, 0.1, 0.01],
            [0.01, 0.1, 1.0, 0.01],
            [
                "x: 0.01, the smallest that was tried, is the best in 2 of 4 cases; try smaller ones too",
                "x: 1, the largest that was tried, is the best in 1 of 4 cases; try larger ones too",
            ],
        ),
        ([1.0, 0.1, 0.01], [0.1], []),
        ([0.1], [0.1], []),
    ],
)
def test_a_best_value_at_the_limit_of_those_tried_is_logged(
    tried: list[float],
    chosen: list[float],
    logged: list[str],
    model_folder: Path,
    evaluation_of: Callable,
    caplog: pytest.LogCaptureFixture,
) -> None:
    evaluation_of(model_folder).log_if_at_limit("x", tried, chosen)
    assert caplog.messages == logged


@pytest.mark.parametrize(
    ("task", "option"),
    [
        (LinearProbe(LinearProbeOptions(l2=[0.1, 0.01], concatenate=0)), "linear_probe.l2"),
        (
            LinearProbe(LinearProbeOptions(solver="sgd", sgd=SgdOptions(rates=[0.1, 0.01], epochs=1, seeds=1))),
            "linear_probe.sgd.rates",
        ),
        (KNN(KnnOptions(k=[5, 20])), "knn.k"),
        (LowData(LowDataOptions(per_class=[4], fractions=[], subsets=1, l2=[0.1, 0.01])), "low_data.l2"),
        (
            AttentiveProbe(AttentiveProbeOptions(learning_rates=[1e-2, 1e-3], epochs=1, heads=2)),
            "attentive_probe.learning_rates",
        ),
        (FineTune(FineTuneOptions(learning_rates=[1e-3, 1e-4], epochs=1)), "fine_tune.learning_rates"),
    ],
)
def test_tasks_log_it(
    task: Task, option: str, model_folder: Path, evaluation_of: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    """With two values, the best one is always the smallest or the largest."""
    task.measure(evaluation_of(model_folder))
    assert f"{option}: " in caplog.text
