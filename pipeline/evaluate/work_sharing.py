"""Work items, divided among the ranks. Each is cached, so a killed task computes only what is missing."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from accelerate.utils import gather_object

from pipeline.evaluate.context import Evaluation

WorkItem = Callable[[], dict[str, Any]]


def map_over_ranks(
    evaluation: Evaluation, label: str, items: Mapping[str, WorkItem], *, arrays: bool = False
) -> dict[str, dict[str, Any]]:
    """Computes each item on one rank, caches its value, and returns all values on every rank, by the items' names.

    An item's value does not depend on the rank that computed it, so the numbers are the same on any number of ranks.
    Without `arrays` the arrays stay on disk; `evaluation.cache.get_or_compute(name, item)` reads them where they are
    needed. A ValueError or OSError on any rank is raised on all ranks.
    """
    accelerator = evaluation.accelerator
    mine = list(items)[accelerator.process_index :: accelerator.num_processes]
    done: list[tuple[str, Any]] = []
    with evaluation.progress(label, len(mine), "work items") as advance:
        for name in mine:
            try:
                value = evaluation.cache.get_or_compute(name, items[name])
            except (ValueError, OSError) as error:
                done.append((name, error))
                break
            done.append((name, value if arrays else _without_arrays(value)))
            advance(1)
    gathered = dict(gather_object(done))
    for outcome in gathered.values():
        if isinstance(outcome, Exception):
            raise outcome
    return {name: gathered[name] for name in items}


def map_parts(
    evaluation: Evaluation, label: str, name: str, count: int, size: int, work: Callable[[slice], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Splits 0..count into parts of `size` (the last may be smaller) and computes `work` of each by `map_over_ranks`.

    Returns the values in order. name: the name of a work item, with {} for the start of its part.
    """
    parts = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    items: dict[str, WorkItem] = {name.format(part.start): partial(work, part) for part in parts}
    return list(map_over_ranks(evaluation, label, items, arrays=True).values())


def _without_arrays(value: dict[str, Any]) -> dict[str, Any]:
    return {key: entry for key, entry in value.items() if not isinstance(entry, np.ndarray)}
