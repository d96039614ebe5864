"""What the scripts of k-NN and linear probes share: features and labels, and the turn that scores predictions.

It runs in the peers' environments too: beside numpy it imports nothing of ours.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.benchmarks.peers.turn import serve

CLASSES = 10
DIRECTIONS = 256
"""In which the features vary, the first the most."""
DISTANCE = 0.15
"""Deviation of the classes' centers along each direction; that within a class is 1."""
NOISE = 0.1
"""Deviation of what each feature varies by itself; in all it is about 5."""
NEIGHBORS, TEMPERATURE = 20, 0.07
"""Of the weighted vote: a neighbor with cosine similarity s has the weight exp(s / TEMPERATURE)."""
STRENGTH = 1e-2
"""Of the probe's L2 penalty: s in (mean loss) + s/2 * (sum of squared weights)."""


class Given:
    """Features of a bank and of queries with their labels, as `write` left them."""

    def __init__(self, folder: Path) -> None:
        self.bank, self.queries = np.load(folder / "bank.npy"), np.load(folder / "queries.npy")  # float32 (N, D)
        self.bank_labels, self.query_labels = np.load(folder / "bank_labels.npy"), np.load(folder / "query_labels.npy")


def write(folder: Path, bank: int, queries: int, width: int) -> None:
    """Correlated features of ten classes that overlap: a direction is as strong as the fourth root of its rank."""
    random = np.random.default_rng(0)
    scales = ((1 + np.arange(DIRECTIONS)) ** -0.25).astype(np.float32)
    centers = DISTANCE * random.standard_normal((CLASSES, DIRECTIONS), np.float32) * scales
    mixing = random.standard_normal((DIRECTIONS, width), np.float32)
    for name, count, labels_name in (("bank", bank, "bank_labels"), ("queries", queries, "query_labels")):
        labels = random.integers(0, CLASSES, count)
        hidden = centers[labels] + random.standard_normal((count, DIRECTIONS), np.float32) * scales
        noise = NOISE * random.standard_normal((count, width), np.float32)
        np.save(folder / f"{name}.npy", hidden @ mixing + noise + 0.1)
        np.save(folder / f"{labels_name}.npy", labels)


def from_command_line() -> Given:
    """The features in the folder that the first argument names."""
    return Given(Path(sys.argv[1]))


def serve_predictions(given: Given, predict: Callable[[], np.ndarray | tuple[np.ndarray, int]]) -> None:
    """predict: the label of each query, or these and the iterations of a fit. A turn begins with the given features."""

    def turn() -> dict[str, float]:
        found = predict()
        labels, figures = (found[0], {"iterations": found[1]}) if isinstance(found, tuple) else (found, {})
        accuracy = float((np.asarray(labels) == given.query_labels).mean())
        return {"work": 1.0, "accuracy": accuracy, **figures}

    serve(turn)


def vote(similarity: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The class with the largest weight, for libraries that only search: (N, k) each to (N,)."""
    weights = np.exp(similarity / TEMPERATURE)
    votes = np.zeros((len(labels), CLASSES), weights.dtype)
    for neighbor in range(labels.shape[1]):
        votes[np.arange(len(labels)), labels[:, neighbor]] += weights[:, neighbor]
    return votes.argmax(axis=1)
