"""The parts in the order in which they run, with their seconds on one H100. Imports no torch."""

from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import Any

HERE = "tests.benchmarks.accelerator"


@dataclass(frozen=True)
class Part:
    """A part: a function that yields rows (report.Row), and lines of tables (str)."""

    name: str
    function: str
    """module:name, imported by the worker."""
    seconds: float
    """The deadline. A part that takes longer is stuck."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the function."""
    needs: float = 0.0
    """For a measurement, the seconds that must be left to start it; 0 for a check, which must run."""

    @property
    def required(self) -> bool:
        """Whether it fails if it does not run."""
        return self.needs == 0.0

    def run(self) -> Any:
        """Imports the function and calls it."""
        return resolve_name(self.function)(**self.options)


def _engine(name: str, seconds: float = 45, **options: Any) -> Part:
    return Part(f"engine {name}", f"{HERE}.engines:check_engine", seconds, options)


CHECKS = (
    Part("machine", f"{HERE}.numbers:machine", 90),  # imports torch from a cold disk
    Part("objectives", f"{HERE}.numbers:check_objectives", 45),
    Part("attention", f"{HERE}.numbers:check_attention", 60),
    Part("decoding", f"{HERE}.numbers:check_decoding", 45),
    Part("collectives", f"{HERE}.collectives:check_collectives", 45),
    Part("preflight", f"{HERE}.processes:check_preflight", 60),
    Part("processes", f"{HERE}.processes:start_processes", 10),
    _engine("zero-1 bf16"),
    _engine("zero-1 fp32", precision="fp32"),
    _engine("zero-1 bf16 compiled", 90, compiled=True),
    _engine("zero-1 fp8", 90, precision="fp8"),
    _engine("zero-1 bf16 recompute", recompute=True),
    _engine("zero-1 bf16 average", average=True),
    _engine("zero-0 bf16", zero_stage=0),
    _engine("zero-2 bf16", zero_stage=2),
    _engine("zero-3 bf16", zero_stage=3),
    _engine("zero-3 bf16 average", zero_stage=3, average=True),
    _engine("zero-3 bf16 compiled", 90, zero_stage=3, compiled=True),
    Part("stop and watchdog", f"{HERE}.processes:check_stop_and_watchdog", 120),
)
"""What must be right: a few seconds each."""

SPEED = (
    Part("train l", f"{HERE}.step_profile:train_l", 150, needs=45),
    Part("blocks", f"{HERE}.block_times:block_times", 120, needs=30),
    Part("peers s", f"{HERE}.speed:peers", 120, {"size": "s"}, needs=40),
    Part("peers l", f"{HERE}.speed:peers", 120, {"size": "l"}, needs=45),
    Part("fp8 l", f"{HERE}.speed:float8_l", 120, needs=40),
    Part("completions", f"{HERE}.speed:sampling", 90, needs=20),
    Part("cifar", f"{HERE}.cifar:train_cifar", 340, needs=200),
    Part("more l", f"{HERE}.speed:more_l", 120, needs=45),
    Part("peers m", f"{HERE}.speed:peers", 120, {"size": "m"}, needs=40),
    Part("train xl", f"{HERE}.speed:train_xl", 120, needs=40),
    Part("features", f"{HERE}.speed:features", 60, needs=20),
    Part("attention times", f"{HERE}.speed:attention_times", 60, needs=15),
)
"""What is measured with the seconds that are left."""

PARTS = (*CHECKS, *SPEED)
