"""What an evaluation task is: a class that measures one model, and says how its result is shown."""

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

    Methods that get an evaluation may raise ValueError for invalid input. Before the first task runs, and on the first
    rank alone, every task is asked `unfit`, `other_inputs` and `check`; `measure` runs on every rank.
    """

    title: ClassVar[str]
    """What the report calls it, such as "Few labels"."""
    published: ClassVar[str] = ""
    """The measure of results/published.py that its accuracy stands beside; "" where nothing was published."""
    options_type: ClassVar[type]
    """The dataclass in the brackets of Task[...]."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for base in getattr(cls, "__orig_bases__", ()):
            if isinstance(get_origin(base), type) and issubclass(get_origin(base), Task):
                (cls.options_type,) = get_args(base)
        options, name = getattr(cls, "options_type", None), cls.__name__
        if "__orig_bases__" in vars(cls) and isinstance(options, TypeVar):
            return  # such as LabelledTask, whose own classes name their options
        if not isinstance(options, type):
            raise TypeError(f"{name} must name the dataclass of its options: class {name}(Task[Options]).")
        if not getattr(cls, "title", ""):
            raise TypeError(f'{name} must have a title for the report, such as title = "Few labels".')

    def __init__(self, options: Options) -> None:
        self.options = options

    def unfit(self, evaluation: Evaluation) -> str | None:
        """Why, in a sentence, this model or shard set can't be measured; unless named, the task is skipped then."""
        return None

    def check(self, evaluation: Evaluation, earlier: Collection[str]) -> None:
        """Raises ValueError if an option does not fit the model or the shard set; quick.

        earlier: names of tasks that will run before, whose output may be missing still.
        """

    def other_inputs(self, results: Path) -> dict[str, str]:
        """What it reads beside the model and the shard set, such as digests of files: recorded in its JSON, and the
        task is measured again when it changed. Raises ValueError if something is missing."""
        return {}

    @abstractmethod
    def measure(self, evaluation: Evaluation) -> dict[str, Any]:
        """The result as JSON will hold it, the same on every rank; figures go into `evaluation.results` from the first
        rank. Numbers may be numpy's; NaN and Inf become null, which `section` then reads.

        Longer work is cached in parts: `evaluation.cache.get_or_compute`, `map_over_ranks`.
        """

    @classmethod
    @abstractmethod
    def summary(cls, result: dict[str, Any]) -> str:
        """The result in a line, without a full stop."""

    @classmethod
    def headlines(cls, result: dict[str, Any]) -> list[Headline]:
        """The numbers that a reader looks for: by default each test accuracy in the result."""
        return accuracy_headlines(result, cls.title, cls.published)

    @classmethod
    def section(cls, result: dict[str, Any], folder: Path) -> str:
        """HTML for the report, by the pieces of results/report/html.py: by default the summary, the PNGs in `folder`
        whose names begin with the task's, lists of objects as tables, and all numbers."""
        return generic_section(result, folder)


class LabelledTask(Task[Options]):
    """A task that needs labels in train, valid and test."""

    def unfit(self, evaluation: Evaluation) -> str | None:
        return why_unlabelled(evaluation)
