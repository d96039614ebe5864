"""lightly's knn_predict on normalized features, as its k-NN benchmark calls it."""

import numpy as np
import torch
from torch.nn import functional

from tests.benchmarks.peers.classifying.work import (
    CLASSES,
    NEIGHBORS,
    TEMPERATURE,
    from_command_line,
    serve_predictions,
)
from tests.benchmarks.peers.torchvision_operators import declare_operators

declare_operators()
from lightly.utils.benchmarking import knn_predict  # noqa: E402


def main() -> None:
    """Takes turns."""
    given = from_command_line()
    labels = torch.from_numpy(given.bank_labels)

    def predict() -> np.ndarray:
        bank = functional.normalize(torch.from_numpy(given.bank), dim=1).t().contiguous()  # (D, N)
        queries = functional.normalize(torch.from_numpy(given.queries), dim=1)
        ranked = knn_predict(queries, bank, labels, CLASSES, NEIGHBORS, TEMPERATURE)  # (queries, classes), best first
        return ranked[:, 0].numpy()

    serve_predictions(given, predict)


if __name__ == "__main__":
    main()
