"""Pooled features of every layer, in one forward pass over a split.

The feature of layer l is the mean over positions of the input of attention block l after its ln_1,
l = 0 .. L-1; layer L is the mean after ln_f (Chen et al. 2020, section 3.3). The sequence is the
training one, [SOS, x0 .. x(n-2)]: without SOS every colour would sit one position off.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pipeline.evaluate.inputs import Evaluation, Pictures, from_first
from pipeline.model.objectives import next_color


@contextmanager
def pooled_layers(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """While open, each forward pass of `model` fills the yielded list with L+1 tensors (B, D), fp32."""
    trunk = model.transformer
    norms = [*(block.ln_1 for block in trunk.h), trunk.ln_f]
    pooled = [torch.empty(0)] * len(norms)

    def keep(layer: int, normed: torch.Tensor) -> None:  # normed (B, T, D)
        pooled[layer] = normed.mean(dim=1, dtype=torch.float32)

    hooks = [
        norm.register_forward_hook(lambda _module, _inputs, normed, layer=layer: keep(layer, normed))
        for layer, norm in enumerate(norms)
    ]
    try:
        yield pooled
    finally:
        for hook in hooks:
            hook.remove()


def pooled_features(evaluation: Evaluation, pictures: Pictures, store: Path) -> np.ndarray:
    """Features of every layer: float32 (L+1, N, D), a memory map of the file `store` on every rank.

    The file (4 * (L+1) * N * D bytes) lies on a file system that all ranks share. Each rank computes
    and writes its own batches; the numbers do not depend on how many ranks there are.
    """
    model, accelerator = evaluation.model.model, evaluation.accelerator
    config = evaluation.model.config
    shape = (config.n_layer + 1, len(pictures), config.n_embd)
    from_first(accelerator, lambda: _reserve(store, shape))
    features = np.load(store, mmap_mode="r+")  # (L+1, N, D)
    label = f"features of {pictures.split.name}"
    with torch.inference_mode(), accelerator.autocast(), pooled_layers(model) as pooled:
        for place, tokens in evaluation.batches(pictures, label):
            inputs, _ = next_color(tokens, config.colors)  # (B, T)
            model.transformer(inputs)
            features[:, place] = torch.stack(pooled).cpu().numpy()  # (L+1, B, D)
    features.flush()
    accelerator.wait_for_everyone()
    return np.load(store, mmap_mode="r")


def _reserve(store: Path, shape: tuple[int, ...]) -> None:
    """Creates the file with its space taken: writing to a map on a full disk would kill the process."""
    store.parent.mkdir(parents=True, exist_ok=True)
    try:
        np.lib.format.open_memmap(store, mode="w+", dtype=np.float32, shape=shape)
        with store.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(store)) from error
