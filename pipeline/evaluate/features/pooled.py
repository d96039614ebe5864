"""Pooled features of every layer, in one forward pass over a split, cached on disk.

The feature of layer l is the mean over positions of the input of attention block l after its ln_1,
l = 0 .. L-1; layer L is the mean after ln_f (Chen et al. 2020, section 3.3). The sequence is the
training one, [SOS, x0 .. x(n-2)]: without SOS every colour would sit one position off.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from data_prep.common.files import file_sha256, json_digest, locked, write_json
from pipeline.evaluate.context import Evaluation, Pictures, from_first

SECONDS_BETWEEN_NOTES = 20.0
"""A killed extraction does at most so much again."""


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


def pooled_features(evaluation: Evaluation, pictures: Pictures, draw: int = 0) -> np.ndarray:
    """Features of every layer: float32 (L+1, N, D), a memory map that every rank reads.

    draw: which colours are hidden, for a model that hides some. The file (4 * (L+1) * N * D bytes) lies in
    `evaluation.features`, on a file system that all ranks share, under a name that tells the model, the pictures and
    all else that it depends on. Each rank computes and writes its own batches; the numbers do not depend on how many
    ranks there are. What was computed before is not computed again: all of it, compared with its digest, or the
    batches that a killed extraction had noted.
    """
    config, accelerator = evaluation.model.config, evaluation.accelerator
    shape = (config.n_layer + 1, len(pictures), config.n_embd)
    facts = _facts(evaluation, pictures, draw)
    cache = Cache(evaluation.features, f"{pictures.split.name}-{json_digest(facts)[:16]}")
    with cache.held(evaluation):
        if not from_first(accelerator, cache.is_whole):
            from_first(accelerator, lambda: cache.reserve(shape))
            done = from_first(accelerator, cache.noted)  # the same for all ranks: they share out what is left
            _compute(evaluation, pictures, draw, cache, done)
            accelerator.wait_for_everyone()
            from_first(accelerator, lambda: cache.seal(facts))
    return np.load(cache.path, mmap_mode="r")


def _facts(evaluation: Evaluation, pictures: Pictures, draw: int) -> dict[str, object]:
    """All that features depend on."""
    return {
        "model_digest": evaluation.model_digest,
        "dataset_digest": evaluation.shards.digest,
        "split": pictures.split.name,
        "pictures": hashlib.sha256(pictures.indices.tobytes()).hexdigest(),
        "precision": str(evaluation.accelerator.mixed_precision),
        "batch_size": evaluation.sizes.batch_size,
        "draw": [evaluation.seed, draw] if evaluation.masked else None,
    }


def _compute(evaluation: Evaluation, pictures: Pictures, draw: int, cache: "Cache", done: set[int]) -> None:
    """This rank's batches, as far as they were not done before."""
    model, accelerator = evaluation.model.model, evaluation.accelerator
    fresh: list[int] = []
    noted_at = time.monotonic()
    with (
        torch.inference_mode(),
        accelerator.autocast(),
        pooled_layers(model) as pooled,
        cache.path.open("r+b", buffering=0) as file,
    ):
        first_byte = np.load(cache.path, mmap_mode="r").offset
        for place, tokens in evaluation.batches(pictures, f"features of {pictures.split.name}", done):
            inputs, _ = evaluation.inputs_and_targets(tokens, pictures.indices[place], draw)  # (B, T)
            model.transformer(inputs)
            _write_rows(file.fileno(), first_byte, torch.stack(pooled).cpu().numpy(), place.start, len(pictures))
            fresh.append(place.start)
            if time.monotonic() - noted_at > SECONDS_BETWEEN_NOTES:
                os.fsync(file.fileno())
                cache.note(accelerator.process_index, fresh)
                fresh, noted_at = [], time.monotonic()
        os.fsync(file.fileno())
    cache.note(accelerator.process_index, fresh)


def _write_rows(descriptor: int, first_byte: int, batch: np.ndarray, start: int, pictures: int) -> None:
    """Writes a batch float32 (L+1, B, D) to its place in the file's array (L+1, N, D).

    Byte by byte, not through a map: two nodes that map the same page of a network file lose one another's edges.
    """
    for layer, rows in enumerate(batch):  # (B, D)
        place = first_byte + (layer * pictures + start) * rows[0].nbytes
        left = rows.tobytes()
        while left:
            written = os.pwrite(descriptor, left, place)
            left, place = left[written:], place + written


class Cache:
    """One file of features: NAME.npy, whole once NAME.json with its digest stands beside it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / f"{name}.npy"
        self._manifest, self._notes = folder / f"{name}.json", folder / f"{name}.batches"

    @contextmanager
    def held(self, evaluation: Evaluation) -> Iterator[None]:
        """Keeps other commands out, such as another task of the same array: they wait, and find the file whole."""
        with ExitStack() as stack:
            lock = self.path.with_name(f".{self.path.name}.lock")
            from_first(evaluation.accelerator, lambda: stack.enter_context(locked(lock, str(self.path))))
            yield

    def is_whole(self) -> bool:
        """Whether the file stands there as it was written; a damaged one is said and removed."""
        if not self._manifest.is_file():
            return False
        try:
            promised = json.loads(self._manifest.read_text())["sha256"]
            if file_sha256(self.path) == promised:
                return True
        except (OSError, ValueError, KeyError, TypeError):
            pass
        print(f"{self.path} is not what was written; its features are computed anew", flush=True)
        self._remove()
        return False

    def reserve(self, shape: tuple[int, ...]) -> None:
        """Creates the file, unless a killed extraction left it, with its space taken: writing to a map on a full disk
        would kill the process."""
        try:
            if self.path.is_file() and np.load(self.path, mmap_mode="r").shape == shape:
                return
        except (OSError, ValueError):
            pass
        self._remove()
        try:
            np.lib.format.open_memmap(self.path, mode="w+", dtype=np.float32, shape=shape)
            with self.path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        except OSError as error:
            self._remove()
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def noted(self) -> set[int]:
        """First pictures of the batches that are on disk."""
        lines = [line for file in self._notes.glob("rank-*") for line in file.read_text().splitlines()]
        return {int(line[:-1]) for line in lines if line.endswith(";")}  # the last line may be cut off

    def note(self, rank: int, batches: list[int]) -> None:
        """Notes batches that this rank has flushed to disk."""
        self._notes.mkdir(exist_ok=True)
        with (self._notes / f"rank-{rank}").open("a") as file:
            file.writelines(f"\n{first};" for first in batches)  # what was cut off before stands on a line of its own

    def seal(self, facts: dict[str, object]) -> None:
        """Writes the manifest: from now on the file is whole."""
        write_json(self._manifest, facts | {"sha256": file_sha256(self.path)})
        self._remove_notes()

    def _remove(self) -> None:
        self._manifest.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        self._remove_notes()

    def _remove_notes(self) -> None:
        for file in self._notes.glob("rank-*"):
            file.unlink()
        if self._notes.is_dir():
            self._notes.rmdir()
