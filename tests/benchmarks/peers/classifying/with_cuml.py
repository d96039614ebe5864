"""cuML's k nearest neighbors and logistic regression on a GPU; knn or probe."""

import sys

import numpy as np
from cuml.linear_model import LogisticRegression
from cuml.neighbors import NearestNeighbors
from cuml.preprocessing import StandardScaler

from tests.benchmarks.peers.classifying.work import NEIGHBORS, STRENGTH, from_command_line, serve_predictions, vote


def main() -> None:
    """Takes turns."""
    given = from_command_line()

    def knn() -> np.ndarray:
        search = NearestNeighbors(n_neighbors=NEIGHBORS, metric="cosine", algorithm="brute").fit(given.bank)
        distances, rows = search.kneighbors(given.queries)
        return vote(1 - np.asarray(distances), given.bank_labels[np.asarray(rows)])

    def probe() -> np.ndarray:
        scaler = StandardScaler()
        regression = LogisticRegression(C=1 / (STRENGTH * len(given.bank)), max_iter=1000)
        regression.fit(scaler.fit_transform(given.bank), given.bank_labels)
        return regression.predict(scaler.transform(given.queries))

    serve_predictions(given, {"knn": knn, "probe": probe}[sys.argv[2]])


if __name__ == "__main__":
    main()
