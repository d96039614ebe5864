"""What `python -m pipeline evaluate` is asked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.evaluate.options import Sizes, Weights
from pipeline.evaluate.registry import TASKS


@dataclass(frozen=True, kw_only=True)
class Command:
    """What to measure and where the results go."""

    shards: str
    """The shard set to measure on: a folder or an address."""
    out: Path
    """The folder of results."""
    tasks: str = ",".join(name for name, entry in TASKS.items() if entry.options is not None and not entry.long)
    """Names of tasks, with commas between, in the order in which they run; beside the default's there are
    attentive_probe, fine_tune and distill, which train for many epochs. A task that declares its options in its own
    file runs, and has them in --help, only if --tasks names it."""
    seed: int = 0
    """Chooses images where there is a cap, and draws completions."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward passes."""
    weights: Weights = "trained"
    """random: initial weights in place of the model's, as a baseline; give it a folder of results of its own."""
    random_weights: Path | None = None
    """The results of a call with `--weights random`, for the report; OUT/random_weights if not set."""
    features: Path | None = None
    """Where features of images are cached, for all tasks and later calls; OUT/.features if not set."""
    overwrite: bool = False
    """Measure again what was already measured with the same inputs."""

    @property
    def named(self) -> bool:
        """Whether the tasks are other than the default's: each must fit the model then."""
        return self.tasks != Command.tasks


@dataclass(frozen=True)
class Request:
    """The command line as parsed."""

    model: Path
    """A run, a checkpoint, a model folder, or hub:ORG/NAME."""
    command: Command
    sizes: Sizes
    options: dict[str, Any]
    """Of each task that is to run, in order."""
    command_line: str
    """As recorded in the results."""
