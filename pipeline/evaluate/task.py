"""The base class of evaluation tasks: a task measures one model, and defines how its result is shown."""

from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, get_args, get_origin

from pipeline.evaluate.context import Evaluation
from pipeline.evaluate.features.labelled import why_unlabelled
from pipeline.results.headline import Headline, accuracy_headlines
from pipeline.results.report.sections import generic_section

Options = TypeVar("Options")


class Task(ABC, Generic[Options]):
    """A task with its options: `class KNN(Task[KnnOptions])`, where the options are a frozen dataclass.

    Methods that receive an evaluation may raise ValueError for invalid input. Before the first task runs, `unfit`,
    `other_inputs` and `check` of every task are called, on the first rank only; `measure` runs on every rank.
    """

    title: ClassVar[str]
    """Its title in the report, such as "Few labels"."""
    published: ClassVar[str] = ""
    """The measure in results/published.py to compare its accuracy with; "" if nothing was published."""
    options_type: ClassVar[type]
    """The dataclass in the brackets of Task[...]."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for base in getattr(cls, "__orig_bases__", ()):
            if isinstance(get_origin(base), type) and issubclass(get_origin(base), Task):
                (cls.options_type,) = get_args(base)
        options, name = getattr(cls, "options_type", None), cls.__name__
        if "__orig_bases__" in vars(cls) and isinstance(options, TypeVar):
            return  # a generic base such as LabelledTask, whose subclasses name their options
        if not isinstance(options, type):
            raise TypeError(f"{name} must name the dataclass of its options: class {name}(Task[Options]).")
        if not getattr(cls, "title", ""):
            raise TypeError(f'{name} must have a title for the report, such as title = "Few labels".')

    def __init__(self, options: Options) -> None:
        self.options = options

    def unfit(self, evaluation: Evaluation) -> str | None:
        """The reason, one sentence, why the task can't run on this model or shard set; None if it can.

        The task is then skipped, or, if --tasks names it, the reason is an error.
        """
        return None

    def check(self, evaluation: Evaluation, earlier: Collection[str]) -> None:
        """Raises ValueError if an option does not fit the model or the shard set. It must be quick.

        earlier: names of the tasks that will run before this one and whose output may not exist yet.
        """

    def other_inputs(self, results: Path) -> dict[str, str]:
        """Digests of what the task reads besides the model and the shard set, such as files.

        They are recorded in its JSON; if one changes, the task runs again. Raises ValueError if something is missing.
        """
        return {}

    @abstractmethod
    def measure(self, evaluation: Evaluation) -> dict[str, Any]:
        """Returns the result for the task's JSON, the same on every rank.

        Numbers may be numpy's; NaN and Inf become null, which `section` must accept. The first rank writes figures into
        `evaluation.results`, with `figures.draw_or_log`. Longer work should be cached in parts:
        `evaluation.cache.get_or_compute`, `map_over_ranks`.
        """

    @classmethod
    @abstractmethod
    def summary(cls, result: dict[str, Any]) -> str:
        """The result in one line, without a full stop."""

    @classmethod
    def headlines(cls, result: dict[str, Any]) -> list[Headline]:
        """The main numbers of the result: by default each test accuracy in it."""
        return accuracy_headlines(result, cls.title, cls.published)

    @classmethod
    def section(cls, result: dict[str, Any], folder: Path) -> str:
        """HTML of the task's section in the report, built with results/report/html.py.

        By default it has the summary, the PNGs in `folder` whose names start with the task's name, a table for each
        list of objects, and all numbers.
        """
        return generic_section(result, folder)


class LabelledTask(Task[Options]):
    """A task that needs labels in train, valid and test."""

    def unfit(self, evaluation: Evaluation) -> str | None:
        return why_unlabelled(evaluation)
