"""Pretraining until a number of CPU-seconds is used, resumable, and features of all images for the probe.

It runs in the peers' environments: beside torch, numpy and Pillow it imports nothing of ours.
"""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

BATCH = 128
WARM_UP = 0.05
"""Of the budget; then the learning rate falls by a cosine to 0 at its end."""
SAVE_SECONDS = 60.0
SPLITS = ("train", "valid", "test")
SAVED = "state.pt"


class Views(torch.utils.data.Dataset[list[torch.Tensor]]):
    """The views that a transform of lightly makes of each training image."""

    def __init__(self, folder: Path, transform: Callable[[Image.Image], list[torch.Tensor]]) -> None:
        self._images, self._transform = np.load(folder / "train.npy", mmap_mode="r"), transform  # uint8 (N, S, S, 3)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, number: int) -> list[torch.Tensor]:
        return self._transform(Image.fromarray(np.array(self._images[number])))


def pretrain(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    views: Views,
    loss_of: Callable[[list[torch.Tensor]], torch.Tensor],
    seconds: float,
    folder: Path,
) -> None:
    """Trains for CPU-seconds, data loading included; a second call continues from the last saved state.

    loss_of: maps the views of a batch to the loss.
    """
    used, steps, rates = 0.0, 0, [group["lr"] for group in optimizer.param_groups]
    if (folder / SAVED).exists():
        state = torch.load(folder / SAVED)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        used, steps, rates = state["used"], state["steps"], state["rates"]
    began, saved = time.process_time() - used, used
    model.train()
    for batch in _batches(views, steps):
        used = time.process_time() - began
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * _share(min(1.0, used / seconds))
        if used >= seconds or used - saved >= SAVE_SECONDS:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"used": used, "steps": steps, "rates": rates}, folder / "new.pt")
            (folder / "new.pt").replace(folder / SAVED)
            saved = used
            print(f"{used:.0f} of {seconds:.0f} CPU-seconds, {steps * BATCH:,} images", flush=True)
        if used >= seconds:
            return
        loss = loss_of(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1


def _share(progress: float) -> float:
    """Of the peak learning rate."""
    if progress < WARM_UP:
        return progress / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))


def _batches(views: Views, seed: int) -> Iterator[list[torch.Tensor]]:
    torch.manual_seed(seed)
    while True:
        yield from torch.utils.data.DataLoader(views, BATCH, shuffle=True, drop_last=True)


def write_features(
    model: nn.Module,
    features_of: Callable[[torch.Tensor], list[torch.Tensor]],
    images: Path,
    folder: Path,
    mean: list[float],
    deviation: list[float],
) -> None:
    """Writes float32 (layers, N, D) of each split.

    features_of: maps normalized images (B, 3, S, S) to features (B, D) of each layer.
    """
    model.eval()
    for split in SPLITS:
        pixels = np.load(images / f"{split}.npy", mmap_mode="r")
        found = []
        with torch.inference_mode():
            for start in range(0, len(pixels), 500):
                batch = torch.from_numpy(np.array(pixels[start : start + 500])).permute(0, 3, 1, 2) / 255
                batch = (batch - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]
                found.append(torch.stack(features_of(batch)))
        np.save(folder / f"{split}.npy", torch.cat(found, dim=1).numpy())
