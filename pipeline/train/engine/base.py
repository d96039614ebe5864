"""The one interface between the loop and DeepSpeed (contract 6), and the one place that configures DeepSpeed."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import isfinite, nan
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from pipeline.checkpoint.fragments import FragmentReader, Tensors
from pipeline.train.engine import offload

ADAM_EPSILON = 1e-8
DIGEST_PIECE = 1 << 24


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
    """This process's place among the data-parallel ranks."""
    data_ranks: int
    """How many ranks read different pictures."""
    work: str
    """Ranks with the same `work` compute the same part of the model."""
    _timer: "ForwardTimer"

    @abstractmethod
    def step(self, tokens: np.ndarray, rate: float, accept: Accept = accept_finite) -> StepResult:
        """One optimizer step on this rank's share of the global batch, uint16 (share, T); the update if accepted."""

    @abstractmethod
    def evaluate(self, tokens: np.ndarray) -> np.ndarray:
        """Nats per token of each picture, float64 (B,), for uint16 (B, T); every rank calls it with the same B."""

    @abstractmethod
    def snapshot(self, earlier: Tensors | None = None) -> tuple[Tensors, list[dict[str, Any]]]:
        """This rank's fragments of fp32 weights and moments, copied to the host, and their index.

        earlier: tensors of a snapshot that may be written over.
        """

    @abstractmethod
    def restore(self, reader: FragmentReader, steps: int) -> None:
        """Takes weights, moments and step count from a checkpoint of any topology."""

    @abstractmethod
    def digests(self) -> dict[str, str]:
        """Of the weights that the forward pass reads, by what other ranks may hold too: equal names, equal weights."""

    def forward_seconds(self) -> float:
        """Seconds that this rank spent in forward passes since it was last asked."""
        return self._timer.read()

    def close(self) -> None:
        """Takes away what the engine put on disks for its own use."""
        offload.clear_own_folder()

    @abstractmethod
    def complete(self, tokens: np.ndarray, samples: int, seed: int) -> np.ndarray:
        """Draws the lower halves of uint16 (B, T) anew: uint16 (B, samples, T), the same on every rank."""


class ConditionalStep:
    """Replaces the optimizer's `step`: the update is made only if `accept` says so, once the gradient is known."""

    def __init__(self, optimizer: torch.optim.Optimizer, observe: Callable[[], tuple[float, float]]) -> None:
        """observe: the loss and gradient norm of the step, called when all gradients are there."""
        self._optimizer, self._observe, self._update = optimizer, observe, optimizer.step
        self._accept: Accept | None = None
        self._decision: StepDecision | None = None
        self._seen = (nan, nan)
        optimizer.step = self._step  # type: ignore[assignment,method-assign]

    def begin(self, accept: Accept) -> None:
        """Before each step; until the first, DeepSpeed's own set-up passes."""
        self._accept, self._decision, self._seen = accept, None, (nan, nan)

    def result(self, loss: float) -> StepResult:
        """Of the last step. Where DeepSpeed refused a non-finite gradient itself, it never asked for the update."""
        norm = self._seen[1]
        apply, reason = self._decision or StepDecision(False, NOT_FINITE)
        return StepResult(loss, norm if norm >= 0 else nan, apply, reason)

    def _step(self) -> None:
        """Called once for each of DeepSpeed's parameter groups."""
        if self._accept is not None and self._decision is None:
            self._seen = self._observe()
            self._decision = self._accept(*self._seen)
        if self._decision is None or self._decision.apply:
            self._update()


class ForwardTimer:
    """Counts the time of a module's forward passes: by events on an accelerator, which is not waited for."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._cuda, self._seconds, self._began = device.type == "cuda", 0.0, 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        module.register_forward_pre_hook(self._begin)
        module.register_forward_hook(self._end)

    def read(self) -> float:
        """Seconds since it was last read; on an accelerator the last pass must have ended."""
        seconds = self._seconds + sum(first.elapsed_time(last) / 1000 for first, last in self._events)
        self._seconds, self._events = 0.0, []
        return seconds

    def _begin(self, *_: Any) -> None:
        if self._cuda:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events.append(pair)
            pair[0].record()
        else:
            self._began = perf_counter()

    def _end(self, *_: Any) -> None:
        if self._cuda:
            self._events[-1][1].record()
        else:
            self._seconds += perf_counter() - self._began


def weights_digest(parameters: Iterable[torch.Tensor]) -> str:
    """Of the bits of tensors, in order: their sums, taken where they lie, so that any one changed bit shows."""
    kinds = {2: torch.int16, 4: torch.int32}
    sums = []
    for parameter in parameters:
        pieces = parameter.detach().view(kinds[parameter.element_size()]).flatten().split(DIGEST_PIECE)
        sums.append(torch.stack([piece.sum(dtype=torch.int64) for piece in pieces]).sum())
    return hashlib.sha256(str(torch.stack(sums).tolist()).encode()).hexdigest()[:16]
