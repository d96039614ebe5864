"""What one node says of itself before a job trains on it, as one line of JSON."""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, field


@dataclass
class Report:
    """The findings on one node; a node whose line is missing is silent."""

    node: str
    faults: dict[str, str] = field(default_factory=dict)
    """A sentence for each of "shards", "run" and "accelerators" that is not as it should be."""
    digest: str | None = None
    """Of the shard set that it reads."""
    free_bytes: int | None = None
    """On the disk of the run."""
    met_all: bool = True
    """Whether the all-reduce between all nodes gave the right sum."""
    met: dict[str, bool] = field(default_factory=dict)
    """After one that did not: whether an all-reduce with a single other node did, by the other's name."""
    seconds: float = 0.0

    def line(self) -> str:
        """For standard output."""
        return json.dumps(asdict(self))


def read_line(line: str) -> Report | None:
    """The report of a line, or None: srun and modules print other lines among them."""
    with suppress(ValueError, TypeError):
        return Report(**json.loads(line))
    return None
