"""A job split into numbered parts, which any machine runs at any time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Part:
    """The share of a job that a call prepares: every `count`-th work item, starting with the `number`-th."""

    number: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise ValueError(f"--part is {self.number}; it must be between 1 and --parts, which is {self.count}.")

    @property
    def name(self) -> str:
        """For file names: 00001-of-00004."""
        return f"{self.number:05d}-of-{self.count:05d}"

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """The work items of this part."""
        return items[self.number - 1 :: self.count]
