"""faiss' flat index of inner products over normalized features, and the same vote."""

import faiss
import numpy as np

from tests.benchmarks.peers.classifying.work import NEIGHBORS, from_command_line, serve_predictions, vote


def main() -> None:
    """Takes turns."""
    given = from_command_line()

    def predict() -> np.ndarray:
        bank, queries = given.bank.copy(), given.queries.copy()
        faiss.normalize_L2(bank)
        faiss.normalize_L2(queries)
        index = faiss.IndexFlatIP(bank.shape[1])
        index.add(bank)
        similarity, rows = index.search(queries, NEIGHBORS)
        return vote(similarity, given.bank_labels[rows])

    serve_predictions(given, predict)


if __name__ == "__main__":
    main()
