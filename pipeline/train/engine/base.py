"""What the training loop knows of an engine: one interface, whatever spreads the model over the ranks."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Any, NamedTuple

import numpy as np

from pipeline.checkpoint.fragments import FragmentReader, Tensors
from pipeline.model.masks import Batch

NOT_FINITE = "not finite"
"""The reason of a step whose loss or gradient norm is NaN or Inf."""


class StepDecision(NamedTuple):
    """What is to become of a step, from its loss and gradient norm."""

    apply: bool
    """Whether to make its update."""
    reason: str | None
    """What is wrong with the step, or None; a loss spike may be applied all the same."""


Accept = Callable[[float, float], StepDecision]
"""Decides about a step by its loss and gradient norm; called on all ranks, with the same values on each."""


def are_finite(loss: float, grad_norm: float) -> bool:
    """Whether both are finite. DeepSpeed's norm of a non-finite gradient may be negative."""
    return isfinite(loss) and isfinite(grad_norm) and grad_norm >= 0


def accept_finite(loss: float, grad_norm: float) -> StepDecision:
    """Applies every step whose loss and gradient norm are finite."""
    return StepDecision(True, None) if are_finite(loss, grad_norm) else StepDecision(False, NOT_FINITE)


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, alike on all ranks."""

    loss: float
    """Mean nats per token over the global batch, before the update."""
    grad_norm: float
    """Global norm of the gradient before clipping."""
    applied: bool
    """False if weights and moments were left as they were."""
    reason: str | None
    """What was wrong with the step, or None."""


class Engine(ABC):
    """A model spread over ranks, with its optimizer."""

    data_rank: int
    """This process's number among the data-parallel ranks."""
    data_ranks: int
    """How many ranks read different images."""
    work: str
    """Ranks with the same `work` compute the same part of the model."""

    @abstractmethod
    def step(self, batch: Batch, learning_rate: float, accept: Accept = accept_finite) -> StepResult:
        """One optimizer step on this rank's share of the global batch; the update if accepted."""

    @abstractmethod
    def evaluate(self, batch: Batch) -> np.ndarray:
        """Nats per token of each image, float64 (B,); every rank calls it with the same number of images B."""

    @abstractmethod
    def complete(self, tokens: np.ndarray, samples: int, seed: int) -> np.ndarray:
        """Draws the lower halves of uint16 (B, T) anew: uint16 (B, samples, T), the same on every rank."""

    @abstractmethod
    def snapshot(self, earlier: Tensors | None = None) -> tuple[Tensors, list[dict[str, Any]]]:
        """This rank's fragments of fp32 weights and moments, copied to the host, and their index.

        earlier: tensors of a snapshot that may be written over.
        """

    @abstractmethod
    def restore(self, reader: FragmentReader, steps: int) -> None:
        """Takes weights, moments and step count from a checkpoint of any topology.

        Raises ValueError on every rank if the checkpoint's parameters are not the model's.
        """

    @abstractmethod
    def replica_checksums(self) -> dict[str, str]:
        """Of the weights that the forward pass reads, by what other ranks may hold too: equal names, equal weights."""

    @abstractmethod
    def forward_seconds(self) -> float:
        """Seconds that this rank spent in forward passes since it was last asked."""

    @abstractmethod
    def close(self) -> None:
        """Deletes what the engine put on disks for its own use."""
