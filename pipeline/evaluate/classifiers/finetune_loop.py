"""The training loop of all tasks that train by gradient descent, with labels or with a teacher.

    order       pass p over the images is a permutation drawn from (seed, p); augmentation is drawn from (seed, epoch)
    ranks       each rank takes its part of every global batch, and DistributedDataParallel averages the gradients;
                one rank and several give the same numbers up to the rounding of sums
    restarts    the state is cached after each epoch; the same command resumes after the last complete epoch, and on
                the same ranks gives bitwise the same result (on CUDA up to the order of sums in the backward pass
                of attention)
    end         training stops after the last epoch, or when validation has not improved for `patience` epochs; the
                module then has the weights of the epoch that was best on validation

A module may contain several independent candidates, such as probes of several layers and learning rates. They are
trained on the same batches, and the best candidate and epoch are chosen together.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn

from data_prep.common.seeding import generator
from pipeline.distributed import from_first
from pipeline.evaluate.context import Evaluation, ImageSubset
from pipeline.evaluate.options import Recipe
from pipeline.model.augmentation import Augmentation


@dataclass(frozen=True)
class Batch:
    """A batch of augmented training images on the device."""

    tokens: torch.Tensor  # long (B, T)
    indices: np.ndarray  # int64 (B,), numbers in the split
    labels: torch.Tensor  # long (B,), -1 where unlabelled
    epoch: int
    """Counts from 1. It seeds what is drawn in each pass, such as masked pixels."""


Losses = Callable[[nn.Module, Batch], torch.Tensor]
"""Calls the (wrapped) module once and returns the loss of each image and candidate, fp32 (B, K)."""


@dataclass(frozen=True)
class Training:
    """A training run: the module, its optimizer, losses and images. K is the number of candidates in the module."""

    name: str
    """The name of its state in the cache, unique within a task."""
    module: nn.Module
    """On the device; the parameters that require gradients are trained and cached."""
    optimizer: torch.optim.Optimizer
    losses: Losses
    accuracies: Callable[[], np.ndarray]
    """Returns the accuracy of each candidate on the validation images, (K,), the same on every rank."""
    images: ImageSubset
    images_per_epoch: int | None = None
    """Length of an epoch, if it differs from the number of `images`: passes over `images` are concatenated and cut."""
    clip_norm: float = 0.0
    """Maximum norm of the gradients; 0 turns clipping off, which independent candidates need."""
    cosine: bool = False
    """Whether a cosine schedule lowers the learning rate to zero over all epochs; otherwise it is constant."""


@dataclass(frozen=True)
class Record:
    """Losses and accuracies by epoch."""

    losses: list[list[float]] = field(default_factory=list)
    """Mean training loss, (E, K)."""
    accuracies: list[list[float]] = field(default_factory=list)
    """Validation accuracy, (E, K)."""

    def __len__(self) -> int:
        return len(self.accuracies)

    def with_epoch(self, losses: np.ndarray, accuracies: np.ndarray) -> "Record":
        """The record with one more epoch; both arrays are (K,)."""
        return Record([*self.losses, losses.tolist()], [*self.accuracies, accuracies.tolist()])

    @property
    def best(self) -> tuple[int, int]:
        """(epoch from 1, candidate) of the best validation accuracy; the earliest of ties."""
        table = np.array(self.accuracies)  # (E, K)
        epoch, candidate = np.unravel_index(table.argmax(), table.shape)
        return int(epoch) + 1, int(candidate)

    @property
    def valid_accuracy(self) -> float:
        """The best validation accuracy."""
        epoch, candidate = self.best
        return self.accuracies[epoch - 1][candidate]

    def losses_of(self, candidate: int) -> list[float | None]:
        """A candidate's training loss by epoch; None where it was NaN or Inf."""
        return [losses[candidate] if math.isfinite(losses[candidate]) else None for losses in self.losses]

    def is_over(self, recipe: Recipe) -> bool:
        """True after the last epoch, after `patience` epochs without improvement, or if all losses are NaN or Inf."""
        if not len(self):
            return False
        stale = recipe.patience > 0 and len(self) - self.best[0] >= recipe.patience
        return len(self) >= recipe.epochs or stale or not np.isfinite(self.losses[-1]).any()


def train(evaluation: Evaluation, training: Training, recipe: Recipe) -> Record:
    """Trains, or resumes an interrupted training; at the end the module has the weights of the best epoch."""
    record = _resume(evaluation, training)
    if not record.is_over(recipe):
        wrapped = _wrap(evaluation, training, recipe)
        while not record.is_over(recipe):
            epoch = len(record) + 1
            losses = _train_epoch(evaluation, training, recipe, wrapped, epoch)  # (K,)
            training.module.eval()
            record = record.with_epoch(losses, training.accuracies())
            from_first(partial(_save, evaluation, training, record, recipe))
            evaluation.log(_line(training.name, record))  # logged after it is cached
    best = evaluation.cache.get(_best_weights(training, record))
    assert best is not None
    _set_weights(training.module, best)
    training.module.eval()
    evaluation.accelerator.wait_for_everyone()
    return record


def search(
    evaluation: Evaluation, learning_rates: list[float], training_at: Callable[[float], Training], recipe: Recipe
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Trains once at each learning rate; returns the module that is best on validation, and the trials.

    Of ties, the first wins. A trial has `learning_rate`, `valid_accuracy`, `best_epoch`,
    `valid_accuracy_by_epoch` and `train_loss_by_epoch` (None where it was NaN or Inf).
    """
    trials = []
    for learning_rate in learning_rates:
        record = train(evaluation, training_at(learning_rate), recipe)
        trials.append(
            {
                "learning_rate": learning_rate,
                "valid_accuracy": record.valid_accuracy,
                "best_epoch": record.best[0],
                "valid_accuracy_by_epoch": [accuracies[0] for accuracies in record.accuracies],
                "train_loss_by_epoch": record.losses_of(0),
            }
        )
    chosen = training_at(best_of(trials)["learning_rate"])
    train(evaluation, chosen, recipe)  # reads the cached weights
    return chosen.module, trials


def best_of(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """The trial that `search` chose. Raises ValueError if every loss was NaN or Inf."""
    if all(loss is None for trial in trials for loss in trial["train_loss_by_epoch"]):
        raise all_diverged([trial["learning_rate"] for trial in trials])
    return max(trials, key=lambda trial: trial["valid_accuracy"])


def all_diverged(learning_rates: list[float]) -> ValueError:
    """The error for the case that the loss diverged at every learning rate."""
    tried = ", ".join(f"{rate:g}" for rate in learning_rates)
    return ValueError(f"learning_rates is {tried}; at each the loss became NaN or Inf, so try smaller ones.")


def epoch_order(seed: int, images: int, images_per_epoch: int, epoch: int) -> np.ndarray:
    """The images of an epoch, int64 (images_per_epoch,): all passes are concatenated and cut into equal parts."""
    first = (epoch - 1) * images_per_epoch
    passes = range(first // images, (first + images_per_epoch - 1) // images + 1)
    stream = np.concatenate([generator(seed, "supervised", "order", number).permutation(images) for number in passes])
    start = first - passes[0] * images
    return stream[start : start + images_per_epoch]


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters, by name."""
    return {name: value for name, value in module.named_parameters() if value.requires_grad}


def _wrap(evaluation: Evaluation, training: Training, recipe: Recipe) -> nn.Module:
    """The module, wrapped to average gradients if there are several ranks."""
    if evaluation.accelerator.num_processes == 1:
        return training.module
    device = evaluation.accelerator.device
    device_ids = [device.index] if device.type == "cuda" else None
    wrapped = nn.parallel.DistributedDataParallel(training.module, device_ids=device_ids, forward_sync_buffers=False)
    # After its first step, DistributedDataParallel changes the layout of gradients, and so the rounding of sums. One
    # discarded step here makes the layout the same whether a training starts or resumes.
    _backward(evaluation, training, wrapped, _Epoch(evaluation, training, recipe, 1), 0, 1)
    training.optimizer.zero_grad()
    return wrapped


class _Epoch:
    """The images of one epoch, ordered and augmented."""

    def __init__(self, evaluation: Evaluation, training: Training, recipe: Recipe, number: int) -> None:
        self.number, self.count = number, training.images_per_epoch or len(training.images)
        self._evaluation, self._images = evaluation, training.images
        self._order = epoch_order(evaluation.seed, len(training.images), self.count, number)  # (count,)
        self._augmentation = Augmentation(recipe.flip, recipe.reflect_crop)
        draw = generator(evaluation.seed, "supervised", "changes", number)
        self._changes = self._augmentation.draw(draw, self.count)

    def batch(self, start: int, stop: int) -> Batch:
        """The images at positions start..stop of the order."""
        positions, changes = self._order[start:stop], self._changes[slice(start, stop)]
        indices, labels = self._images.indices[positions], self._images.labels[positions]
        tokens = self._images.split.gather(indices)[0]  # uint16 (B, T)
        augmented = self._augmentation.apply(tokens, changes, self._evaluation.shards.resolution)
        on_device = self._evaluation.on_device
        return Batch(on_device(augmented), indices, on_device(labels), self.number)


def _train_epoch(
    evaluation: Evaluation, training: Training, recipe: Recipe, wrapped: nn.Module, number: int
) -> np.ndarray:
    """Mean loss of each candidate over the epoch, (K,), the same on every rank."""
    epoch = _Epoch(evaluation, training, recipe, number)
    steps = math.ceil(epoch.count / recipe.global_size)
    groups = training.optimizer.param_groups
    peaks = [group.setdefault("initial_lr", group["lr"]) for group in groups]
    total: torch.Tensor | float = 0.0
    training.module.train()
    with evaluation.progress(f"{training.name}, epoch {number}", epoch.count) as advance:
        for step in range(steps):
            if training.cosine:
                done = ((number - 1) * steps + step) / (recipe.epochs * steps)
                for group, peak in zip(groups, peaks, strict=True):
                    group["lr"] = peak * (1 + math.cos(math.pi * done)) / 2
            start, stop = step * recipe.global_size, min((step + 1) * recipe.global_size, epoch.count)
            total = total + _backward(evaluation, training, wrapped, epoch, start, stop)
            if training.clip_norm:
                nn.utils.clip_grad_norm_(trainable(training.module).values(), training.clip_norm)
            training.optimizer.step()
            training.optimizer.zero_grad()
            advance(stop - start)
    return (evaluation.accelerator.reduce(total, "sum") / epoch.count).cpu().numpy()


def _backward(
    evaluation: Evaluation, training: Training, wrapped: nn.Module, epoch: _Epoch, start: int, stop: int
) -> torch.Tensor:
    """Gradients of a global batch's mean loss; returns the sum of this rank's losses, float64 (K,)."""
    accelerator, size = evaluation.accelerator, evaluation.sizes.batch_size
    ranks = accelerator.num_processes
    mine = np.array_split(np.arange(start, stop), ranks)[accelerator.process_index]
    weight = ranks / (stop - start)  # DistributedDataParallel averages over ranks
    if not len(mine):  # a rank without images must take part in the average too
        mine, weight = np.array([start]), 0.0
    sums = []
    for first in range(mine[0], mine[-1] + 1, size):
        batch = epoch.batch(first, min(first + size, mine[-1] + 1))
        is_last = first + size > mine[-1]
        with nullcontext() if is_last else accelerator.no_sync(wrapped):
            with accelerator.autocast():
                losses = training.losses(wrapped, batch)  # (B, K)
            accelerator.backward(losses.sum() * weight)
        sums.append(losses.detach().double().sum(0) * (weight > 0))  # (K,)
    return torch.stack(sums).sum(0)


def _line(name: str, record: Record) -> str:
    _, candidate = record.best
    accuracy = record.accuracies[-1][candidate]
    loss = record.losses[-1][candidate]
    best = record.valid_accuracy
    return f"{name}, epoch {len(record)}: loss {loss:.4f}, validation accuracy {accuracy:.1%} (best {best:.1%})"


# The cached state of an epoch


def _state(training: Training) -> str:
    return f"{training.name}/state"


def _best_weights(training: Training, record: Record) -> str:
    return f"{training.name}/epoch-{record.best[0]:04d}"


def _save(evaluation: Evaluation, training: Training, record: Record, recipe: Recipe) -> None:
    """Caches the state of the last epoch; if it is the best epoch, its weights are cached first."""
    cache, best = evaluation.cache, _best_weights(training, record)
    weights = {name: value.detach().cpu().numpy() for name, value in trainable(training.module).items()}
    if record.best[0] == len(record):
        cache.put(best, weights)
    state: dict[str, Any] = {"record": asdict(record)}
    if not record.is_over(recipe):
        optimizer = training.optimizer.state_dict()
        state |= {f"weights/{name}": value for name, value in weights.items()}
        state |= {"param_groups": optimizer["param_groups"]}
        for number, moments in optimizer["state"].items():
            state |= {f"moments/{number}/{key}": value.cpu().numpy() for key, value in moments.items()}
    cache.put(_state(training), state)
    cache.keep_only(f"{training.name}/epoch-*", best)


def _resume(evaluation: Evaluation, training: Training) -> Record:
    """Loads the weights and moments of the last cached epoch; returns its record, which is empty if there is none."""
    state = evaluation.cache.get(_state(training))
    record = Record() if state is None else Record(**state["record"])
    is_cached = state is not None and evaluation.cache.get(_best_weights(training, record)) is not None
    if not all(gather_object([is_cached])):
        if (evaluation.cache.folder / training.name / "state.pt").is_file():
            evaluation.log(f"{training.name}: its cached state is of an earlier version; training starts again")
        return Record()
    assert state is not None
    if "param_groups" in state:
        _set_weights(training.module, state, "weights/")
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name in state:
            if name.startswith("moments/"):
                _, number, key = name.split("/")
                moments.setdefault(int(number), {})[key] = torch.from_numpy(state[name])
        training.optimizer.load_state_dict({"param_groups": state["param_groups"], "state": moments})
        evaluation.log(f"{training.name}: resumes after epoch {len(record)}")
    return record


def _set_weights(module: nn.Module, arrays: dict[str, np.ndarray], prefix: str = "") -> None:
    with torch.no_grad():
        for name, parameter in trainable(module).items():
            parameter.copy_(torch.from_numpy(arrays[prefix + name]))
