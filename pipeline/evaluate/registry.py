"""The evaluation tasks by name."""

from importlib import import_module
from types import ModuleType

from pipeline.results.published import FINE_TUNING, LOW_DATA, PROBE

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

TITLES = {
    "linear_probe": "Linear probe",
    "knn": "k-NN",
    "low_data": "Few labels",
    "attentive_probe": "Attentive probe",
    "fine_tune": "Fine-tuning",
    "distill": "Distillation",
    "density": "Density",
    "completions": "Completions",
}
MEASURES = {"linear_probe": PROBE, "fine_tune": FINE_TUNING, "low_data": LOW_DATA}
"""As published.py calls what a task's accuracies are."""

LONG = ("attentive_probe", "fine_tune", "distill")
"""Trainings of many epochs: they run only where they are named."""


def _module(task: str) -> ModuleType:
    return import_module(TASKS[task])
