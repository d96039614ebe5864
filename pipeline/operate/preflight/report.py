"""The report of one node before a job trains on it, as one line of JSON."""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, field

from data_prep.common.files import to_json


@dataclass
class Report:
    """The findings on one node. A node whose line is missing did not answer."""

    node: str
    faults: dict[str, str] = field(default_factory=dict)
    """A sentence for each failed check, by its kind: "shards", "run" or "accelerators"."""
    digest: str | None = None
    """Digest of the shard set that the node reads; of a mixture, of the digests of its sets."""
    free_bytes: int | None = None
    """Free bytes on the run's disk."""
    all_reduce_ok: bool = True
    """Whether the all-reduce between all nodes gave the right sum."""
    pairs_ok: dict[str, bool] = field(default_factory=dict)
    """If it did not: by the other node's name, whether an all-reduce with this one node did."""
    seconds: float = 0.0

    def line(self) -> str:
        """The line of JSON for standard output."""
        return to_json(asdict(self))


def read_line(line: str) -> Report | None:
    """The report in a line, or None for any other line: srun and modules print some too."""
    with suppress(ValueError, TypeError):
        return Report(**json.loads(line))
    return None
