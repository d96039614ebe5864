"""Counts the images of `valid` and `test` that are also in `train`: those with equal tokens.

Each image is represented by 8 bytes of a digest. In memory are those of `valid` and `test`, twice while they are
sorted, and of the shard of `train` that is being compared: for ImageNet 1 MB.
"""

from hashlib import blake2b

import numpy as np

from data_prep.shards.format import PIXELS_DTYPE

DIGEST_BYTES = 8
"""Two of a hundred million images have the same digest with a probability of 0.03%."""


def token_digests(tokens: np.ndarray) -> np.ndarray:
    """uint64 (n,) of images uint16 (n, T), equal for equal images."""
    rows = np.ascontiguousarray(tokens, PIXELS_DTYPE)
    return np.frombuffer(b"".join(blake2b(row, digest_size=DIGEST_BYTES).digest() for row in rows), "<u8")


class Overlap:
    """Takes the digests of all images, those of `train` last."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[np.ndarray]] = {}
        self._splits: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        """Of a split: the digests of its images, sorted, and whether train has them (of equal ones, only the first)."""

    def add(self, split: str, digests: np.ndarray) -> None:
        if split != "train":
            self._waiting.setdefault(split, []).append(digests)
            return
        self._sort()
        for known, found in self._splits.values():
            places = np.searchsorted(known, digests).clip(max=len(known) - 1)
            found[places[known[places] == digests]] = True

    def counts(self) -> dict[str, int]:
        """By split, `train` excepted: the number of images that are also in train."""
        self._sort()
        return {split: _equal_to(known, known[found]) for split, (known, found) in self._splits.items()}

    def _sort(self) -> None:
        for split in list(self._waiting):
            known = np.concatenate(self._waiting.pop(split))
            known.sort()
            self._splits[split] = known, np.zeros(len(known), bool)


def _equal_to(known: np.ndarray, values: np.ndarray) -> int:
    """How many of the sorted numbers `known` are one of the different `values`."""
    return int((np.searchsorted(known, values, "right") - np.searchsorted(known, values)).sum())
