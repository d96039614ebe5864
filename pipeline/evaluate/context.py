"""What every task receives: the model, the shard set, the ranks, and the images of a split in fixed batches."""

import logging
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from data_prep.common.progress import progress
from data_prep.common.seeding import generator
from data_prep.palette.codec import palette_sha256
from data_prep.shards.reader import ShardSet, Split
from pipeline.distributed import bind_to_close_cpus, integer_variable, select_device
from pipeline.evaluate.cache import TaskCache
from pipeline.evaluate.options import Sizes, Weights
from pipeline.model import objectives
from pipeline.model.masks import Masks
from pipeline.model_folder.convert import LoadedModel, load_model_folder

logger = logging.getLogger(__name__)

GROUP_TIMEOUT = timedelta(days=2)
"""Timeout of collectives: all ranks wait for the rank that fits the slowest probe, and for rank 0 while another command
runs the same task."""


@dataclass(frozen=True)
class ImageSubset:
    """Some images of one split, in file order."""

    split: Split
    indices: np.ndarray  # int64 (N,)
    labels: np.ndarray  # int32 (N,), -1 where unlabelled

    def __len__(self) -> int:
        return len(self.indices)

    def tokens(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Palette indices, uint16 (n, T), of the images start..stop of this subset."""
        return self.split.gather(self.indices[start:stop])[0]


def split_labels(split: Split) -> np.ndarray:
    """All labels of a split, int32 (images,), in file order."""
    labels = [split.record(record)[1] for record in range(len(split.record_images))]
    return np.concatenate([np.empty(0, np.int32), *labels])


def choose_images(
    shards: ShardSet, split_name: str, *, limit: int | None, seed: int, labelled: bool = False
) -> ImageSubset:
    """All images of a split, or a random `limit` of them that depends on (seed, split name) alone.

    With `labelled`, unlabelled images are excluded. Raises ValueError if the split is absent or has no such
    images.
    """
    split = shards.split(split_name)
    labels = split_labels(split)
    indices = np.flatnonzero(labels >= 0) if labelled else np.arange(len(labels))
    if not len(indices):
        what = "labelled images" if labelled else "images"
        raise ValueError(f"{shards.path} has no {what} in its split {split_name}, which this task needs.")
    if limit is not None and limit < len(indices):
        chosen = generator(seed, "evaluate", split_name).choice(indices, limit, replace=False)
        indices = np.sort(chosen)
    return ImageSubset(split, indices.astype(np.int64), labels[indices])


@dataclass(frozen=True)
class Evaluation:
    """One model on one shard set, and the folder of its results."""

    model: LoadedModel
    shards: ShardSet
    results: Path
    accelerator: Accelerator
    seed: int
    sizes: Sizes
    cache: TaskCache
    """The cache of the running task."""
    features: Path
    """The folder in which features are cached."""
    model_digest: str
    """Digest of the weights that are evaluated."""
    weights: Weights = "trained"

    @property
    def masked(self) -> bool:
        """Whether the model predicts masked pixels from all other pixels."""
        return self.model.mask_probability is not None

    def inputs_and_targets(
        self, tokens: torch.Tensor, indices: np.ndarray, draw: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's inputs and its targets, both long (B, T), of images long (B, T).

        indices: the images' numbers in their split, int64 (B,). For a masked model, they and `draw` determine which
        pixels are masked (the paper masks at evaluation too), and the other targets are IGNORED.
        """
        colors = self.model.config.colors
        if self.model.mask_probability is None:
            return objectives.next_color(tokens, colors)
        masks = Masks(self.seed, self.model.mask_probability)
        masked = torch.from_numpy(masks.draw(f"draw {draw}", indices, tokens.shape[1]))
        return objectives.masked_color(tokens, masked.to(tokens.device), colors)

    def on_device(self, tokens: np.ndarray) -> torch.Tensor:
        """Integers as a long tensor of the same shape on this rank's device."""
        return torch.from_numpy(tokens.astype(np.int64)).to(self.accelerator.device)

    @property
    def is_first(self) -> bool:
        """True on the one rank that logs and writes files."""
        return self.accelerator.is_main_process

    def images(self, split_name: str, *, labelled: bool = False) -> ImageSubset:
        """`choose_images` with the seed and the limits of this evaluation."""
        limit = self.sizes.limit(split_name)
        return choose_images(self.shards, split_name, limit=limit, seed=self.seed, labelled=labelled)

    def batches(
        self, images: ImageSubset, label: str, done: Container[int] = ()
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """This rank's batches: (the slice of `images`, tokens long (B, T) on the device).

        Batch k goes to rank k modulo the number of ranks. A batch has the same images on any number of ranks, so what
        is computed from it is bitwise equal. Batches whose first image is in `done` are skipped before the others are
        divided.
        """
        size, ranks = self.sizes.batch_size, self.accelerator.num_processes
        starts = [start for start in range(0, len(images), size) if start not in done]
        left = sum(min(size, len(images) - start) for start in starts)
        with self.progress(label, left) as advance:
            for number, start in enumerate(starts[self.accelerator.process_index :: ranks]):
                tokens = self.on_device(images.tokens(start, start + size))  # (B, T)
                yield slice(start, start + len(tokens)), tokens
                advance(min(size * ranks, left - number * size * ranks))

    def batches_of(self, images: ImageSubset, part: slice) -> Iterator[tuple[slice, torch.Tensor]]:
        """All batches of a part of the images, on any rank: like `batches`, without division and progress."""
        for start in range(part.start, part.stop, self.sizes.batch_size):
            rows = slice(start, min(start + self.sizes.batch_size, part.stop))
            yield rows, self.on_device(images.tokens(rows.start, rows.stop))

    def progress(self, label: str, total: int, unit: str = "images") -> AbstractContextManager[Callable[[int], object]]:
        """Progress of the first rank, which stands for all: the ranks work at about the same speed."""
        return progress(label, total, unit) if self.is_first else nullcontext(lambda _count: None)

    def log(self, line: str) -> None:
        """Logs a line, on the first rank only."""
        if self.is_first:
            logger.info(line)

    def log_if_at_limit(self, option: str, tried: Sequence[float], chosen: Sequence[float]) -> None:
        """Logs if the best value is the smallest or the largest that was tried: values beyond it may be better.

        chosen: one of `tried`, for each choice that was made.
        """
        for what, instead, value in (("smallest", "smaller", min(tried)), ("largest", "larger", max(tried))):
            if value in chosen and min(tried) < max(tried):
                times = f" in {chosen.count(value)} of {len(chosen)} cases" if len(chosen) > 1 else ""
                self.log(f"{option}: {value:g}, the {what} that was tried, is the best{times}; try {instead} ones too")


def start_accelerator(precision: Literal["fp32", "bf16"]) -> Accelerator:
    """The device and the ranks, from torchrun's environment variables; a single rank without them."""
    select_device(integer_variable("LOCAL_RANK", 0))
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="bf16" if precision == "bf16" else "no",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=GROUP_TIMEOUT)],
    )
    bind_to_close_cpus(accelerator.device)
    return accelerator


def load_matching(folder: Path, shards: ShardSet) -> LoadedModel:
    """Loads a model folder. Raises ValueError if it is damaged or does not match the shard set."""
    model = load_model_folder(folder)
    check_match(model, folder, shards)
    return model


def check_match(model: LoadedModel, folder: Path, shards: ShardSet) -> None:
    """Raises ValueError if the model has no palette, or if the shard set has another palette or resolution."""
    if model.resolution != shards.resolution:
        raise ValueError(
            f"{folder} has a model of {model.resolution}x{model.resolution} pixels, but {shards.path} has "
            f"{shards.resolution}x{shards.resolution}; build the shard set at the model's resolution."
        )
    if model.palette is None:
        raise ValueError(
            f"{folder} has no palette in preprocessor_config.json; without it tokens can't be mapped to colors."
        )
    found = palette_sha256(model.palette)
    if found != shards.palette_sha256:
        raise ValueError(
            f"{folder} has palette {found[:12]}, but {shards.path} has palette "
            f"{shards.palette_sha256[:12]}; build the shard set with the model's palette (palette.file)."
        )
