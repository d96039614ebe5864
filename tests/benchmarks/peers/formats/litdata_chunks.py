"""litdata: chunks of tokens without a header for each sample (TokensLoader), as its page on pretraining says."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from litdata import CombinedStreamingDataset, StreamingDataLoader, StreamingDataset, TokensLoader, optimize

SEED = 0
CHUNK_BYTES = 64 << 20
"""Its default size of a chunk."""
INPUTS = 64
"""Blocks of images that optimize() is given, as it is given files."""


def _blocks(file: str, block: int) -> Iterator[torch.Tensor]:
    tokens = np.load(file, mmap_mode="r")
    size = -(-len(tokens) // INPUTS)
    for image in tokens[block * size : (block + 1) * size]:
        yield torch.from_numpy(image.copy())


def write(tokens: np.ndarray, folder: Path) -> None:
    """With one worker."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.parent / f"{folder.name}.npy"
    np.save(file, tokens)
    optimize(
        fn=partial(_blocks, str(file)),
        inputs=list(range(INPUTS)),
        output_dir=str(folder),
        chunk_size=CHUNK_BYTES // tokens.itemsize // tokens.shape[1] * tokens.shape[1],
        item_loader=TokensLoader(),
        num_workers=1,
    )
    (folder / "positions").write_text(str(tokens.shape[1]))


class Loader:
    """Its StreamingDataLoader."""

    def __init__(self, dataset: Any, size: int, workers: int, state: dict[str, Any] | None) -> None:
        persistent = {"persistent_workers": True} if workers else {}
        self.batches = StreamingDataLoader(dataset, batch_size=size, num_workers=workers, **persistent)
        if state is not None:
            self.batches.load_state_dict(state)

    def __iter__(self) -> Iterator[np.ndarray]:
        for batch in self.batches:
            yield batch.numpy()


def _dataset(folder: Path) -> StreamingDataset:
    positions = int((folder / "positions").read_text())
    return StreamingDataset(
        str(folder), item_loader=TokensLoader(block_size=positions), shuffle=True, drop_last=True, seed=SEED
    )


def loader(folder: Path, size: int, workers: int = 0, state: dict[str, Any] | None = None) -> Loader:
    """Local chunks are mapped in place."""
    return Loader(_dataset(folder), size, workers, state)


def state_of(read_by: Loader, read: int) -> dict[str, Any]:
    """Its own state."""
    return read_by.batches.state_dict()


def mixture(folders: list[Path], weights: list[float], size: int, images: int, workers: int) -> Loader:
    """CombinedStreamingDataset with weights; a pass ends with the first set that is read."""
    sets = [_dataset(folder) for folder in folders]
    combined = CombinedStreamingDataset(sets, seed=SEED, weights=weights, iterate_over_all=False)
    return Loader(combined, size, workers, None)
