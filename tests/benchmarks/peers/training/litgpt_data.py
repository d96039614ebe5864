"""A litgpt data module: the images of an .npy file, as `litgpt pretrain --data` takes it."""

from typing import Any

import numpy as np
import torch
from litgpt.data import DataModule
from torch.utils.data import DataLoader, Dataset


class Tokens(Dataset[torch.Tensor]):
    """SOS and the tokens of each image; litgpt takes inputs and targets out of the T + 1 ids."""

    def __init__(self, file: str, sos: int) -> None:
        self._tokens, self._sos = np.load(file, mmap_mode="r"), sos  # uint16 (N, T)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([[self._sos], self._tokens[number]]))  # int64 (T + 1,)


class Loader(DataLoader[torch.Tensor]):
    """One whose state can be saved: litgpt's checkpoint would contain a plain one whole, and a resume refuses that."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a resume begins an epoch."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is restored."""


class Images(DataModule):
    """SOS and the tokens of each image, shuffled."""

    def __init__(self, file: str, sos: int = 512) -> None:
        super().__init__()
        self.file, self.sos = file, sos
        self.batch_size = 1

    def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None, **_: Any) -> None:
        """Takes the micro-batch."""
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        """Shuffled."""
        return Loader(Tokens(self.file, self.sos), self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[torch.Tensor]:
        """Litgpt demands one; two of its batches are evaluated before the first step."""
        return DataLoader(Tokens(self.file, self.sos), self.batch_size)
