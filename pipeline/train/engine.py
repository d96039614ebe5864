"""The one interface between the loop and DeepSpeed (contract 6), and the one place that configures DeepSpeed."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import isfinite, nan
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GPT2Config

from pipeline.checkpoint.fragments import FragmentReader, Tensors
from pipeline.config import TrainConfig
from pipeline.distributed import Ranks
from pipeline.train import offload, tensor_parallel

ADAM_EPSILON = 1e-8
DIGEST_PIECE = 1 << 24


Accept = Callable[[float, float], bool]
"""Whether to make the update of a step with this loss and gradient norm; asked on all ranks, alike on all."""


def are_finite(loss: float, grad_norm: float) -> bool:
    """Whether both are numbers. DeepSpeed's norm of what is none may be negative."""
    return isfinite(loss) and isfinite(grad_norm) and grad_norm >= 0


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, alike on all ranks."""

    loss: float
    """Mean nats per token over the global batch, before the update."""
    grad_norm: float
    """Global norm of the gradient before clipping."""
    applied: bool
    """False if weights and moments were left as they were."""


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
    def step(self, tokens: np.ndarray, rate: float, accept: Accept = are_finite) -> StepResult:
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


class Gate:
    """Stands between the gradient and the update: the optimizer's `step` asks it."""

    def __init__(self, optimizer: torch.optim.Optimizer, observe: Callable[[], tuple[float, float]]) -> None:
        """observe: the loss and gradient norm of the step, called when all gradients are there."""
        self._optimizer, self._observe, self._update = optimizer, observe, optimizer.step
        self._accept: Accept | None = None
        self._open: bool | None = None
        self._seen = (nan, nan)
        optimizer.step = self._step  # type: ignore[assignment,method-assign]

    def arm(self, accept: Accept) -> None:
        """Before each step; until the first, DeepSpeed's own set-up passes."""
        self._accept, self._open, self._seen = accept, None, (nan, nan)

    def result(self, loss: float) -> StepResult:
        """Of the last step. DeepSpeed asks for the update, or refuses one whose gradient is not finite by itself."""
        norm = self._seen[1]
        return StepResult(loss, norm if norm >= 0 else nan, applied=bool(self._open))

    def _step(self) -> None:
        """Called once for each of DeepSpeed's parameter groups."""
        if self._accept is not None and self._open is None:
            self._seen = self._observe()
            self._open = self._accept(*self._seen)
        if self._accept is None or self._open:
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


def build_engine(config: TrainConfig, model_config: GPT2Config, ranks: Ranks, initial: bool = True) -> Engine:
    """Builds the model in its place, initialised by config.seed; needs the process group.

    initial: False leaves the weights as the memory is, for a checkpoint to fill.
    """
    if config.parallel.pipeline_stages > 1:
        from pipeline.train.stages import StagesEngine

        return StagesEngine(config, model_config, ranks, initial)
    from pipeline.train.zero import ZeroEngine

    return ZeroEngine(config, model_config, ranks, initial)


def deepspeed_config(config: TrainConfig, ranks: Ranks) -> dict[str, Any]:
    """DeepSpeed's configuration for a run; bf16, and so fp8, keeps fp32 master weights and sums gradients in fp32."""
    settings: dict[str, Any] = {
        "train_batch_size": config.batch.global_size,
        "train_micro_batch_size_per_gpu": config.batch.micro_size,
        "gradient_accumulation_steps": config.accumulation_steps(config.parallel.data_ranks(ranks.count)),
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": config.parallel.offload != "none",  # a class derived from DeepSpeed's own
        "zero_optimization": {
            "stage": config.parallel.zero_stage,
            "contiguous_gradients": True,
            "overlap_comm": ranks.device.type == "cuda",
        },
    }
    settings["zero_optimization"] |= offload.settings(config.parallel, pinned=ranks.device.type == "cuda")
    if config.parallel.tensor_parallel > 1:
        # DeepSpeed would check the batch against all ranks, before it knows which of them read the same pictures.
        del settings["train_batch_size"]
        settings["tensor_parallel"] = tensor_parallel.settings(config.parallel.tensor_parallel)
    if config.parallel.zero_stage > 0:
        settings["gradient_clipping"] = config.optimizer.clip_norm
    if config.precision == "bf16" and config.parallel.zero_stage == 0:
        # Without ZeRO nothing holds the fp32 master weights but the model itself.
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    elif config.precision != "fp32":
        settings["bf16"] = {"enabled": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["communication_data_type"] = "fp32"
    return settings


def new_optimizer(config: TrainConfig, parameters: Iterable[tuple[str, nn.Parameter]]) -> Any:
    """Adam with decoupled weight decay on the blocks' and the head's matrices."""
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in parameters:
        matrix = len(full_shape(parameter)) >= 2 and not name.startswith(("transformer.wte", "transformer.wpe"))
        (decayed if matrix else spared).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.optimizer.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    if config.parallel.offload != "none":
        return offload.new_cpu_adam(groups, config.optimizer, ADAM_EPSILON)
    return torch.optim.AdamW(
        groups,
        lr=config.optimizer.learning_rate,
        betas=config.optimizer.betas,
        eps=ADAM_EPSILON,
        fused=True,
    )


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """A parameter's shape before ZeRO-3 cut it over the ranks."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def to_device(tokens: np.ndarray, device: torch.device) -> torch.Tensor:
    """uint16 on the host to int64 on the device; widened there, so that two bytes a token are copied, and not waited
    for on an accelerator."""
    narrow = torch.from_numpy(np.ascontiguousarray(tokens))
    if device.type == "cuda":
        narrow = narrow.pin_memory()
    return narrow.to(device, non_blocking=True).long()
