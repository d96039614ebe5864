"""scikit-learn's k nearest neighbors and logistic regression, as its user guide shows; knn or probe."""

import sys

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tests.benchmarks.peers.classifying.work import (
    NEIGHBORS,
    STRENGTH,
    TEMPERATURE,
    from_command_line,
    serve_predictions,
)


def main() -> None:
    """Takes turns."""
    given = from_command_line()

    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances) / TEMPERATURE)

    def knn() -> np.ndarray:
        neighbors = KNeighborsClassifier(NEIGHBORS, metric="cosine", algorithm="brute", weights=weights)
        return neighbors.fit(given.bank, given.bank_labels).predict(given.queries)

    def probe() -> tuple[np.ndarray, int]:
        regression = LogisticRegression(C=1 / (STRENGTH * len(given.bank)), max_iter=1000)
        fitted = make_pipeline(StandardScaler(), regression).fit(given.bank, given.bank_labels)
        return fitted.predict(given.queries), int(regression.n_iter_.max())

    serve_predictions(given, {"knn": knn, "probe": probe}[sys.argv[2]])


if __name__ == "__main__":
    main()
