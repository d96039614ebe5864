"""mosaicml-streaming: MDS shards of a column of fixed shape, read from a local folder."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from tests.benchmarks.peers.torchvision_operators import declare_operators

declare_operators()
from streaming import MDSWriter, Stream, StreamingDataLoader, StreamingDataset  # noqa: E402
from streaming.base.util import clean_stale_shared_memory  # noqa: E402

SEED = 0


def write(tokens: np.ndarray, folder: Path) -> None:
    """Without compression, which would cost time, and in shards of the default size, 64 MiB."""
    with MDSWriter(out=str(folder), columns={"tokens": f"ndarray:uint16:{tokens.shape[1]}"}) as writer:
        for image in tokens:
            writer.write({"tokens": image})


class Loader:
    """Its StreamingDataLoader, tokens alone."""

    def __init__(self, dataset: StreamingDataset, size: int, workers: int, state: dict[str, Any] | None) -> None:
        persistent = {"persistent_workers": True} if workers else {}
        self.batches = StreamingDataLoader(dataset, batch_size=size, num_workers=workers, drop_last=True, **persistent)
        if state is not None:
            self.batches.load_state_dict(state)

    def __iter__(self) -> Iterator[np.ndarray]:
        for batch in self.batches:
            yield batch["tokens"].numpy()


def loader(folder: Path, size: int, workers: int = 0, state: dict[str, Any] | None = None) -> Loader:
    """num_canonical_nodes is left at its default; all ranks of the benchmark are on one node.

    Ranks join a process group first, as those that train have done: else the library joins and leaves one several
    times, at one port, which can hang.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("gloo")
    clean_stale_shared_memory()
    return Loader(_dataset(size, local=str(folder)), size, workers, state)


def _dataset(size: int, **source: Any) -> StreamingDataset:
    return StreamingDataset(shuffle=True, shuffle_seed=SEED, batch_size=size, **source)


def state_of(read_by: Loader, read: int) -> dict[str, Any]:
    """Its own state."""
    state = read_by.batches.state_dict()
    assert state is not None
    return state


def mixture(folders: list[Path], weights: list[float], size: int, images: int, workers: int) -> Loader:
    """Stream(proportion=); a pass is an epoch of `images`."""
    clean_stale_shared_memory()
    streams = [Stream(local=str(folder), proportion=weight) for folder, weight in zip(folders, weights, strict=True)]
    return Loader(_dataset(size, streams=streams, epoch_size=images), size, workers, None)
