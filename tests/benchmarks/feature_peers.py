"""k-NN and linear probes on given features beside other libraries: make bench PARTS=classifiers

50,000 features of width 1,536 (iGPT-L's) with labels, and 1,000 queries. A turn is everything from the features as they
are given to the predicted labels: normalization or standardization, index or fit, prediction.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from pipeline.costs import measured_matmul_peak
from tests.benchmarks import models
from tests.benchmarks.marks import Result, result
from tests.benchmarks.peers.classifying.work import write
from tests.benchmarks.peers.measure import HEAD, SLOW_TURNS, Measured, Script, compare, lines_of, values

BANK, QUERIES, WIDTH = 50_000, 1_000, 1_536
PEERS = "tests.benchmarks.peers.classifying"


def scripts(folder: Path, work: str) -> list[Script]:
    """Ours first; work: knn or probe."""
    arguments = (folder, work)
    found = [
        Script("ours", f"{PEERS}.ours", arguments),
        Script("scikit-learn", f"{PEERS}.with_sklearn", arguments),
    ]
    if work == "knn":
        found.append(Script("faiss IndexFlatIP", f"{PEERS}.with_faiss", arguments))
        found.append(Script("lightly knn_predict", f"{PEERS}.with_lightly", arguments, environment="lightly"))
    if torch.cuda.is_available():
        found.append(Script("cuML, on the GPU", f"{PEERS}.with_cuml", arguments, environment="cuml"))
    return found


def accuracies(measured: list[Measured]) -> str:
    """Of each that ran."""
    return ", ".join(f"{one.script.name} {one.turns['accuracy'][0]:.1%}" for one in measured if one.error is None)


def table(folder: Path) -> Iterator[str | Result]:
    """A line for each peer, in seconds; then the accuracies, and ours against the mark and the machine."""
    write(folder, BANK, QUERIES, WIDTH)
    knn = compare(*scripts(folder, "knn"), turns=SLOW_TURNS)
    probe = compare(*scripts(folder, "probe"), turns=SLOW_TURNS)
    neighbors, fit = f"k-NN of {QUERIES:,} among {BANK:,} of {WIDTH:,}", f"linear probe on {BANK:,} of {WIDTH:,}"
    yield HEAD
    yield from lines_of(neighbors, "s", knn, "seconds")
    yield from lines_of(fit, "s", probe, "seconds")
    yield f"\nAccuracy, k-NN: {accuracies(knn)}; linear probe: {accuracies(probe)}. In seconds less is better."
    iterations = max(values(probe[1], "iterations"), default=0)
    if iterations:
        yield f"scikit-learn's fit took {iterations} iterations; ours calls the same solver."
    products = measured_matmul_peak(torch.float32, torch.device("cpu"))
    seconds = {"mark": 1, "more_is_better": False}
    limits = {"limit": 2 * BANK * QUERIES * WIDTH / products, "limited_by": "its matrix product"}
    yield result(neighbors, "s", knn, "seconds", **seconds, **limits)
    limits = {}
    if iterations:
        # For the scores and for the gradient of each iteration and of the start, and twice to standardize them.
        reads = 2 + 2 * (iterations + 1)
        limits["limit"] = reads * 4 * BANK * WIDTH / models.read_rate(torch.device("cpu"))
        limits["limited_by"] = "reading the features twice an iteration"
    yield result(fit, "s", probe, "seconds", **seconds, **limits)
