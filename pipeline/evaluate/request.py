"""The parsed command line of `python -m pipeline evaluate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.evaluate.options import Sizes, Weights
from pipeline.evaluate.registry import TASKS


@dataclass(frozen=True, kw_only=True)
class Command:
    """What to evaluate, and where to write the results."""

    shards: str
    """The shard set to evaluate on: a folder or a URL."""
    out: Path
    """The results folder."""
    tasks: str = ",".join(name for name, entry in TASKS.items() if entry.options is not None and not entry.long)
    """Comma-separated names of tasks, in the order in which they run. attentive_probe, fine_tune and distill train for
    many epochs and are not in the default. A task that you added runs only if --tasks names it; then
    --help also shows its options."""
    seed: int = 0
    """Seed of everything random: the choice of images if their number is limited, order, masks, and samples."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the forward passes."""
    weights: Weights = "trained"
    """random: evaluate initial weights instead of the model's, as a baseline; use a separate --out for them."""
    random_weights: Path | None = None
    """The results of a run with --weights random, to show in the report; OUT/random_weights if not set."""
    features: Path | None = None
    """The folder in which features are cached for all tasks and later runs; OUT/.features if not set."""
    overwrite: bool = False
    """Run tasks again that already have results for the same inputs."""

    @property
    def named(self) -> bool:
        """Whether --tasks differs from the default; then a task that can't run on this model is an error."""
        return self.tasks != Command.tasks


@dataclass(frozen=True)
class Request:
    """The command line as parsed."""

    model: Path
    """A run, a checkpoint, a model folder, or hub:ORG/NAME."""
    command: Command
    sizes: Sizes
    options: dict[str, Any]
    """The options of each task to run, in order."""
    command_line: str
    """The command line, as recorded in the results."""
