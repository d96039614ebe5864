"""Work in pieces: shared out among the ranks, each piece kept, so that a task that was killed goes on where it was."""

from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline.evaluate.context import Evaluation

Piece = Callable[[], dict[str, Any]]


def shared_out(evaluation: Evaluation, label: str, pieces: dict[str, Piece]) -> dict[str, dict[str, Any]]:
    """Does each piece on one rank, keeps its value, and gives all values but their arrays to every rank.

    A piece's value does not depend on the rank that did it, so the numbers are the same on any number of ranks.
    Its arrays stay on disk: `evaluation.kept.once(name, piece)` reads them where they are wanted. A mistake of the
    user on any rank is raised on all.
    """
    from accelerate.utils import gather_object

    accelerator = evaluation.accelerator
    mine = list(pieces)[accelerator.process_index :: accelerator.num_processes]
    done: list[tuple[str, Any]] = []
    with evaluation.progress(label, len(mine), "pieces") as advance:
        for name in mine:
            try:
                done.append((name, _without_arrays(evaluation.kept.once(name, pieces[name]))))
            except (ValueError, OSError) as error:
                done.append((name, error))
                break
            advance(1)
    gathered = dict(gather_object(done))
    for outcome in gathered.values():
        if isinstance(outcome, Exception):
            raise outcome
    return {name: gathered[name] for name in pieces}


def _without_arrays(value: dict[str, Any]) -> dict[str, Any]:
    return {key: entry for key, entry in value.items() if not isinstance(entry, np.ndarray)}
