"""Random numbers that depend on the seed and on their purpose, not on the order in which they are drawn."""

import hashlib

import numpy as np


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """An independent generator for each (seed, purpose), such as (0, "view", "train", index, view)."""
    words = "/".join(map(str, (seed, *purpose)))
    return np.random.default_rng(int.from_bytes(hashlib.sha256(words.encode()).digest()[:16], "little"))
