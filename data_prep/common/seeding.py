"""Random numbers that are a function of what they are for, not of when they are drawn."""

import hashlib

import numpy as np


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """An independent generator for each (seed, purpose), such as (0, "view", "train", picture, view)."""
    words = "/".join(map(str, (seed, *purpose)))
    return np.random.default_rng(int.from_bytes(hashlib.sha256(words.encode()).digest()[:16], "little"))
