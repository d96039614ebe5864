"""The evaluation tasks by name."""

from importlib import import_module
from types import ModuleType

TASKS = {
    "linear_probe": "pipeline.evaluate.linear_probe",
    "knn": "pipeline.evaluate.knn",
    "low_data": "pipeline.evaluate.low_data",
    "attentive_probe": "pipeline.evaluate.attentive_probe",
    "fine_tune": "pipeline.evaluate.fine_tune",
    "distill": "pipeline.evaluate.distill",
    "density": "pipeline.evaluate.density",
    "completions": "pipeline.evaluate.completions",
}


LONG = ("attentive_probe", "fine_tune", "distill")
"""Trainings of many epochs: they run only where they are named."""


def _module(task: str) -> ModuleType:
    return import_module(TASKS[task])
