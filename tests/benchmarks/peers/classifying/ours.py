"""`evaluate`'s k-NN and linear probe on given features; the second argument is knn or probe."""

import sys

import numpy as np
import torch

from pipeline.evaluate.classifiers.logistic import logistic_path
from pipeline.evaluate.features.labelled import Labelled
from pipeline.evaluate.tasks.knn import predictions
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
    bank = Labelled(given.bank, given.bank_labels)

    def knn() -> np.ndarray:
        return predictions(bank, given.queries, [NEIGHBORS], TEMPERATURE, torch.device("cpu"))[0]

    def probe() -> np.ndarray:
        [classifier] = logistic_path(bank, [STRENGTH])
        return classifier.predict(given.queries)

    serve_predictions(given, {"knn": knn, "probe": probe}[sys.argv[2]])


if __name__ == "__main__":
    main()
