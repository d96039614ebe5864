"""One job as many: numbered parts, which any machine runs at any time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Part:
    """Which share of a job a call does: each `count`-th piece, from the `number`-th on."""

    number: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise ValueError(f"--part is {self.number}; it must be between 1 and --parts, which is {self.count}.")

    @property
    def name(self) -> str:
        """As files are named: 00001-of-00004."""
        return f"{self.number:05d}-of-{self.count:05d}"

    def of(self, pieces: Sequence[Thing]) -> Sequence[Thing]:
        """The pieces that this part does."""
        return pieces[self.number - 1 :: self.count]
