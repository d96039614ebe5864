"""Takes turns at resuming in the middle of an epoch: python -m tests.benchmarks.peers.resuming FORMAT TOKENS

Before the turns one rank reads half an epoch, keeps its state, and reads on. A turn resumes with that state on 1, 2 and
4 ranks, each a process forked from this one, whose imports are done. Its figures: the seconds until the last rank has
its first batch, and how many of the next global batches hold the images that the uninterrupted rank read
(`same_images_N`), and hold them in the same order (`same_order_N`), as fractions. In order are the ranks' shares one
after the other, or an image of each in turn. Where a peer can't resume on N ranks, `error_N` says why.
"""

import multiprocessing
import os
import pickle
import sys
import time
from itertools import islice
from multiprocessing.queues import Queue
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from tests.benchmarks.peers.formats import format_of
from tests.benchmarks.peers.reading import BATCH
from tests.benchmarks.peers.token_images import load, numbers_of
from tests.benchmarks.peers.turn import serve
from tests.launch import free_port

RANKS = (1, 2, 4)
FOLLOWING = 20
"""Global batches after the resume that are compared."""
SECONDS = 60
"""The longest that a rank may take."""


def main(name: str, file: str) -> None:
    """Writes the set, reads half of it, then resumes."""
    form, tokens = format_of(name), load(file)
    with TemporaryDirectory(dir=Path(file).parent) as temporary:
        folder = Path(temporary) / "set"
        form.write(tokens, folder)
        half = len(tokens) // BATCH // 2
        read = _in_child(_read_on, form, folder, half)
        state, expected = pickle.loads(read["state"]), read["batches"]

        def turn() -> dict[str, Any]:
            figures: dict[str, Any] = {"work": 1.0}
            for ranks in RANKS:
                try:
                    figures |= _resume(form, folder, state, expected, ranks)
                except RuntimeError as error:
                    figures[f"error_{ranks}"] = str(error)
            return figures

        serve(turn)


def _read_on(form: Any, folder: Path, half: int) -> dict[str, Any]:
    """The state in the middle of an epoch, and the batches that follow."""
    read_by = form.loader(folder, BATCH, 0)
    batches = iter(read_by)
    for _ in islice(batches, half):
        pass
    state = pickle.dumps(form.state_of(read_by, half))
    return {"state": state, "batches": [numbers_of(batch) for batch in islice(batches, FOLLOWING)]}


def _resume(form: Any, folder: Path, state: Any, expected: list[np.ndarray], ranks: int) -> dict[str, float]:
    """Figures of a resume on some ranks."""
    port = free_port()
    context, answers = multiprocessing.get_context("fork"), multiprocessing.get_context("fork").Queue()
    arguments = (form, folder, state, ranks)
    children = [
        context.Process(target=_answer, args=(answers, rank, port, _first_batches, arguments)) for rank in range(ranks)
    ]
    began = time.monotonic()
    for child in children:
        child.start()
    found = dict(_get(answers, children) for _ in children)
    for child in children:
        child.join(SECONDS)
    shares = list(zip(*(found[rank]["batches"] for rank in range(ranks)), strict=False))
    return {f"first_batch_{ranks}": max(one["first"] for one in found.values()) - began, **_same(shares, expected)}


def _same(shares: list[tuple[np.ndarray, ...]], expected: list[np.ndarray]) -> dict[str, float]:
    """How many global batches have the expected images, as fractions; shares: of each global batch, by rank."""
    pairs, ranks = list(zip(shares, expected, strict=False)), len(shares[0])
    joined = [np.array_equal(np.concatenate(share), whole) for share, whole in pairs]
    in_turn = [np.array_equal(np.stack(share, axis=1).ravel(), whole) for share, whole in pairs]
    images = [sorted(np.concatenate(share)) == sorted(whole) for share, whole in pairs]
    return {
        f"same_images_{ranks}": sum(images) / FOLLOWING,
        f"same_order_{ranks}": max(sum(joined), sum(in_turn)) / FOLLOWING,
    }


def _first_batches(form: Any, folder: Path, state: Any, ranks: int) -> dict[str, Any]:
    """When a rank has its first batch, and its shares of the global batches that follow."""
    batches = iter(form.loader(folder, BATCH // ranks, 0, state))
    shares = [numbers_of(next(batches))]
    first = time.monotonic()
    return {"first": first, "batches": shares + [numbers_of(batch) for batch in islice(batches, FOLLOWING - 1)]}


def _in_child(function: Any, *arguments: Any) -> dict[str, Any]:
    """What a function gives in a process of its own, whose shared memory and threads end with it."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_answer, args=(answers, 0, free_port(), function, arguments))
    child.start()
    answer = _get(answers, [child])[1]
    child.join(SECONDS)
    return answer


def _answer(answers: "Queue[Any]", rank: int, port: int, function: Any, arguments: Any) -> None:
    ranks = arguments[-1] if function is _first_batches else 1
    os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "NNODES": "1", "NODE_RANK": "0"}
    os.environ |= {name: str(rank) for name in ("RANK", "GLOBAL_RANK", "LOCAL_RANK")}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        answers.put((rank, function(*arguments)))
    except Exception as error:
        answers.put((rank, f"rank {rank} of {ranks}: {type(error).__name__}: {error}"))
    answers.close()
    answers.join_thread()


def _get(answers: "Queue[Any]", children: list[Any]) -> tuple[int, dict[str, Any]]:
    """A child's answer. Raises RuntimeError with its error; the other children, which may wait for it, are ended."""
    rank, answer = answers.get(timeout=SECONDS)
    if isinstance(answer, str):
        for child in children:
            child.terminate()
        raise RuntimeError(answer)
    return rank, answer


if __name__ == "__main__":
    main(*sys.argv[1:])
