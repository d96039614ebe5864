"""k-NN and linear probes on given features beside other libraries: make bench PARTS=classifiers

50,000 features of width 1,536 (iGPT-L's) with labels, and 1,000 queries. A turn is everything from the features as they
are given to the predicted labels: normalization or standardization, index or fit, prediction.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from pipeline.costs import measured_matmul_peak
from tests.benchmarks.marks import against
from tests.benchmarks.peers.classifying.work import write
from tests.benchmarks.peers.measure import HEAD, Measured, Script, compare, lines_of

BANK, QUERIES, WIDTH = 50_000, 1_000, 1_536
PROBE_TURNS = 3
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


def table(folder: Path) -> Iterator[str]:
    """A line for each peer and task, in seconds; then accuracies and what matrix products would allow."""
    write(folder, BANK, QUERIES, WIDTH)
    yield HEAD
    knn = compare(*scripts(folder, "knn"))
    yield from lines_of(f"k-NN, {BANK:,} x {WIDTH:,}, {QUERIES:,} queries", "s", knn, "seconds")
    probe = compare(*scripts(folder, "probe"), turns=PROBE_TURNS)
    yield from lines_of(f"linear probe, {BANK:,} x {WIDTH:,}", "s", probe, "seconds")
    for what, measured in (("k-NN", knn), ("linear probe", probe)):
        yield f"\n{what}: {against(1, measured, 'seconds', more_is_better=False)}."
    yield f"\nAccuracy, k-NN: {accuracies(knn)}; linear probe: {accuracies(probe)}. In seconds less is better."
    if knn[0].error is None:
        rate = measured_matmul_peak(torch.float32, torch.device("cpu"))
        least, ours = 2 * BANK * QUERIES * WIDTH / rate, float(np.median(knn[0].turns["seconds"]))
        yield (
            f"The matrix product of k-NN alone takes {least:.3g} s at the rate of a large one on this machine, "
            f"{least / ours:.0%} of ours."
        )
