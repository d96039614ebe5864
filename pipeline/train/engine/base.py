"""The interface between the training loop and the engines."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import isfinite
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.checkpoint.fragments import StateReader, Tensors
from pipeline.model.masks import Batch
from pipeline.model.sampling import NextScores

NOT_FINITE = "not finite"
"""The reason for skipping a step whose loss or gradient norm is NaN or Inf; a value of skipped.jsonl."""


class StepDecision(NamedTuple):
    """Whether to apply a step, decided from its loss and gradient norm."""

    apply: bool
    """Whether to apply the update."""
    reason: str | None
    """What is wrong with the step, or None. A loss spike may be applied."""


Accept = Callable[[float, float], StepDecision]
"""Decides on a step from its loss and gradient norm; called on all ranks with the same values."""


def are_finite(loss: float, grad_norm: float) -> bool:
    """Whether both are finite. DeepSpeed's norm of a non-finite gradient may be negative."""
    return isfinite(loss) and isfinite(grad_norm) and grad_norm >= 0


def accept_finite(loss: float, grad_norm: float) -> StepDecision:
    """Applies every step whose loss and gradient norm are finite."""
    return StepDecision(True, None) if are_finite(loss, grad_norm) else StepDecision(False, NOT_FINITE)


@dataclass(frozen=True)
class StepResult:
    """The result of an optimizer step, the same on all ranks."""

    loss: float
    """Mean nats per token over the global batch, before the update."""
    grad_norm: float
    """Global norm of the gradient before clipping."""
    applied: bool
    """False if the step was skipped: weights and moments are unchanged."""
    reason: str | None
    """What is wrong with the step, or None."""


Check = Callable[[], None]
CHECK_POSITIONS = 8
"""Positions that are sampled between two calls of a check."""


def unchecked() -> None:
    """A check that raises nothing."""


def checked(next_scores: NextScores, check: Check) -> NextScores:
    """The same function, with a call of `check` at every CHECK_POSITIONS-th position."""

    def scores(so_far: torch.Tensor) -> torch.Tensor:
        if so_far.shape[1] % CHECK_POSITIONS == 0:
            check()
        return next_scores(so_far)

    return scores


class Engine(ABC):
    """A model on several ranks, with its optimizer."""

    data_rank: int
    """This process's data-parallel rank."""
    data_ranks: int
    """Number of data-parallel ranks."""
    work: str
    """The part of the model that this rank computes: ranks with equal `work` are compared in speed."""

    @abstractmethod
    def step(self, batch: Batch, learning_rate: float, accept: Accept = accept_finite) -> StepResult:
        """One optimizer step on this rank's share of the global batch; applies the update if `accept` says so."""

    @abstractmethod
    def evaluate(self, batch: Batch) -> np.ndarray:
        """Nats per token of each image, float64 (B,); every rank calls it with the same number of images B."""

    @abstractmethod
    def features(self, batch: Batch) -> dict[int, np.ndarray]:
        """Pooled features of each image, float32 (B, D), by layer (model/layer_features.py): of the layers that this
        rank computes. Every rank calls it with the same number of images B."""

    @abstractmethod
    def complete(self, tokens: np.ndarray, samples: int, seed: int, check: Check = unchecked) -> np.ndarray:
        """Samples new lower halves for images uint16 (B, T): uint16 (B, samples, T), the same on every rank.

        check: called on all ranks every CHECK_POSITIONS positions; what it raises ends the sampling.
        """

    @abstractmethod
    def snapshot(self, earlier: Tensors | None = None) -> tuple[Tensors, list[dict[str, Any]]]:
        """This rank's fragments of fp32 weights, moments and average, copied to the host, and their index.

        earlier: tensors of an earlier snapshot, to be overwritten.
        """

    @abstractmethod
    def restore(self, reader: StateReader, steps: int) -> None:
        """Restores weights, moments and step count from a checkpoint of any topology.

        With ema.decay, the average too; it starts from the weights if the checkpoint has none. Raises ValueError on
        every rank if the checkpoint's parameters are not the model's.
        """

    @abstractmethod
    def averaged(self) -> AbstractContextManager[None]:
        """In this context, forward passes use the moving average of the weights; needs ema.decay.

        Every rank enters it. Afterwards the weights are as before, bit for bit, unless an error ended it that not
        every rank raised.
        """

    @abstractmethod
    def replica_checksums(self) -> dict[str, str]:
        """Checksums of this rank's weights by replica name: ranks with the same name must have the same checksum.

        Under ZeRO-0 the average, which every rank updates by itself, has one too.
        """

    @abstractmethod
    def forward_seconds(self) -> float:
        """Seconds that this rank spent in forward passes since the last call."""

    @abstractmethod
    def close(self) -> None:
        """Deletes the engine's temporary files."""
