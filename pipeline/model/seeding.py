"""torch generators seeded by purpose; `data_prep.common.seeding` has numpy's."""

import hashlib

import torch


def torch_generator(purpose: str) -> torch.Generator:
    """An independent generator on the CPU for each purpose, such as "0:transformer.wpe.weight"."""
    digest = hashlib.sha256(purpose.encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))
