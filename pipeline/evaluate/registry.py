"""The evaluation tasks by name. To add a task, write its file and add one line here."""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pipeline.evaluate import options

if TYPE_CHECKING:
    from pipeline.evaluate.task import Task


@dataclass(frozen=True)
class Entry:
    """Where a task is defined, and when it runs."""

    path: str
    """MODULE:CLASS."""
    options: type | None = None
    """The dataclass of its options, if options.py declares it, so that --help need not import the task. A task that
    declares its options in its own file runs only if --tasks names it, and only then are its options known."""
    long: bool = False
    """Whether it trains for many epochs; such a task runs only if --tasks names it."""


_TASKS = "pipeline.evaluate.tasks"
TASKS = {
    "linear_probe": Entry(f"{_TASKS}.linear_probe:LinearProbe", options.LinearProbeOptions),
    "knn": Entry(f"{_TASKS}.knn:KNN", options.KnnOptions),
    "low_data": Entry(f"{_TASKS}.low_data:LowData", options.LowDataOptions),
    "attentive_probe": Entry(f"{_TASKS}.attentive_probe:AttentiveProbe", options.AttentiveProbeOptions, long=True),
    "fine_tune": Entry(f"{_TASKS}.fine_tune:FineTune", options.FineTuneOptions, long=True),
    "distill": Entry(f"{_TASKS}.distill:Distill", options.DistillOptions, long=True),
    "density": Entry(f"{_TASKS}.density:Density", options.DensityOptions),
    "completions": Entry(f"{_TASKS}.completions:Completions", options.CompletionsOptions),
}


def task_class(name: str) -> "type[Task[Any]]":
    """The class of a task; imports its module."""
    module, _, name_in_module = TASKS[name].path.partition(":")
    return getattr(import_module(module), name_in_module)


def options_type(name: str) -> type:
    """The dataclass of a task's options; imports its module only if the registry does not name them."""
    return TASKS[name].options or task_class(name).options_type
