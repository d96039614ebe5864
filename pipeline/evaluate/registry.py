"""The evaluation tasks by name."""

from importlib import import_module
from types import ModuleType

TASKS = {
    "linear_probe": "pipeline.evaluate.tasks.linear_probe",
    "knn": "pipeline.evaluate.tasks.knn",
    "low_data": "pipeline.evaluate.tasks.low_data",
    "attentive_probe": "pipeline.evaluate.tasks.attentive_probe",
    "fine_tune": "pipeline.evaluate.tasks.fine_tune",
    "distill": "pipeline.evaluate.tasks.distill",
    "density": "pipeline.evaluate.tasks.density",
    "completions": "pipeline.evaluate.tasks.completions",
}


LONG = ("attentive_probe", "fine_tune", "distill")
"""Trainings of many epochs: they run only where they are named."""


def _module(task: str) -> ModuleType:
    return import_module(TASKS[task])
