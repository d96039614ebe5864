"""The common base class of the engines over DeepSpeed; subclasses run a batch through the model."""

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from io import StringIO
from math import nan
from typing import Any

import deepspeed
import numpy as np
import torch
from torch import nn
from transformers import GPT2Config

from pipeline.checkpoint.fragments import StateReader, Tensors
from pipeline.config import TrainConfig
from pipeline.distributed import Ranks
from pipeline.model import objectives
from pipeline.model.layer_features import layer_norms, observed_layers, pooled
from pipeline.model.masks import Batch
from pipeline.rank_errors import is_on_all_ranks
from pipeline.train.engine import average, offload, snapshot, tensor_parallel
from pipeline.train.engine import deepspeed_internals as internals
from pipeline.train.engine.base import NOT_FINITE, Accept, Engine, StepDecision, StepResult, accept_finite
from pipeline.train.engine.compilation import RecompileWatch, is_on
from pipeline.train.engine.deepspeed_config import clips_in_update, new_optimizer
from pipeline.train.engine.forward_timer import ForwardTimer

CHECKSUM_ELEMENTS = 1 << 24
"""Elements summed at a time."""
CLIP_EPSILON = 1e-6


class DeepSpeedEngine(Engine):
    """An engine over a DeepSpeed engine."""

    _engine: Any
    """DeepSpeed's engine."""
    _model: nn.Module
    """The complete model, which names the parameters; layers of other pipeline stages are on the meta device."""
    _coordinates: internals.RankCoordinates

    def __init__(self, config: TrainConfig, model_config: GPT2Config, ranks: Ranks) -> None:
        self._config, self._model_config, self._ranks = config, model_config, ranks
        self.data_ranks = config.parallel.data_ranks(ranks.count)
        self._tensor = tensor_parallel.new_group(config, ranks)
        watches = ranks.is_first or config.parallel.pipeline_stages > 1  # stages compile different blocks
        self._recompile_watch = RecompileWatch() if watches and is_on(config, ranks.device) else None

    def _start(
        self,
        module: nn.Module,
        parameters: list[tuple[str, nn.Parameter]],
        settings: dict[str, Any],
        grid: Any = None,
    ) -> None:
        """Initializes DeepSpeed with the module and an optimizer of the named parameters.

        grid: the groups of tensor parallelism; a pipeline module has its own.
        """
        tensor_parallel.mark_parts(parameters, self._coordinates.parts)
        optimizer = new_optimizer(self._config, parameters)
        clip_norm = self._config.optimizer.clip_norm if clips_in_update(self._config) else 0.0
        self._conditional_step = ConditionalStep(optimizer, self._loss_and_norm, clip_norm, self._config.ema.decay)
        internals.import_muon_uncompiled()
        with redirect_stdout(StringIO()):  # DeepSpeed prints memory tables and layers
            self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings, mpu=grid)
        internals.stop_timers(self._engine)
        internals.remove_repeated_passes(self._engine)
        internals.reduce_without_waiting(self._engine.optimizer)
        self._timer = ForwardTimer(self._engine.module, self._ranks.device)

    @abstractmethod
    def _train(self, batch: Batch) -> torch.Tensor:
        """Runs forward and backward passes and the optimizer step: mean nats per token over the global batch (1,).

        The host need not wait for it.
        """

    @abstractmethod
    def _loss_and_norm(self) -> tuple[float, float]:
        """Loss and gradient norm of the step, once all gradients are computed."""

    def step(self, batch: Batch, learning_rate: float, accept: Accept = accept_finite) -> StepResult:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._conditional_step.begin(accept)
        self._engine.set_train_batch_size(len(batch) * self.data_ranks)
        result = self._conditional_step.result(self._train(batch))
        if self._recompile_watch is not None:
            self._recompile_watch.check()
        return result

    def features(self, batch: Batch) -> dict[int, np.ndarray]:
        """With the forward passes of `evaluate`, so that a probe has no collectives that a validation has not."""
        norms = layer_norms(self._model)
        own = [layer for layer, norm in enumerate(norms) if not any(weight.is_meta for weight in norm.parameters())]
        rows: dict[int, list[torch.Tensor]] = {layer: [] for layer in own}
        with observed_layers(self._model, own, lambda layer, normed: rows[layer].append(pooled(normed))):
            self.evaluate(batch)
        means = {layer: torch.cat(parts)[: len(batch)] for layer, parts in rows.items()}
        if self._tensor:
            with self._divided(batch.tokens.shape[1]):
                means = {layer: self._tensor.mean(values) for layer, values in means.items()}
        return {layer: values.cpu().numpy() for layer, values in means.items()}

    def snapshot(self, earlier: Tensors | None = None) -> tuple[Tensors, list[dict[str, Any]]]:
        return snapshot.snapshot(self._engine.optimizer, self._model, self._coordinates, earlier)

    def restore(self, reader: StateReader, steps: int) -> None:
        snapshot.restore(self._engine.optimizer, self._model, self._coordinates, reader)
        internals.set_progress(self._engine, steps, self._config.batch.images_after(steps))

    def _start_average(self) -> None:
        """Starts the average of the weights, if there is one; called at the end of the construction."""
        if self._config.ema.decay:
            average.start(self._engine.optimizer, self._model, self._coordinates)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        state = (self._engine.optimizer, self._model, self._coordinates)
        average.exchange(*state)
        try:
            yield
        except Exception as error:
            if is_on_all_ranks(error):  # after an error of one rank, the others would wait for it
                average.exchange(*state)
            raise
        average.exchange(*state)

    def forward_seconds(self) -> float:
        return self._timer.read()

    def close(self) -> None:
        offload.clear_own_folder()

    def _divided(self, positions: int | None) -> AbstractContextManager[None]:
        """The context of forward passes over this number of positions; None: that grows one by one."""
        return self._tensor.complete_positions(positions) if self._tensor else nullcontext()

    def _micro_batches(self, batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Inputs and targets, long (micro_size, T) each, on the device; the last may be smaller."""
        size, device = self._config.batch.micro_size, self._ranks.device
        tokens = to_device(batch.tokens, device)  # (B, T)
        masked = None if batch.masked is None else to_device(batch.masked, device)  # (B, T)
        for first in range(0, len(batch), size):
            chosen = slice(first, first + size)
            yield objectives.inputs_and_targets(
                tokens[chosen], None if masked is None else masked[chosen], self._model_config.colors
            )

    def _image_nats(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """fp32 (B,): mean nats of each image's predicted tokens."""
        return objectives.image_loss(logits, targets, self._model_config.colors)


class ConditionalStep:
    """Replaces the optimizer's `step`: applies the update only if `accept` decides so from loss and gradient norm.

    This is where a step is skipped, and the only place of a step where the host waits for loss and gradient norm: the
    decision must be known before the update, so that no non-finite step is ever applied.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        observe: Callable[[], tuple[float, float]],
        clip_norm: float = 0.0,
        decay: float = 0.0,
    ) -> None:
        """observe: returns the loss and gradient norm of the step, once all gradients are computed.

        clip_norm: the norm to which the fused update itself clips, without another pass over the gradients; 0: it
        doesn't clip, because DeepSpeed has clipped the gradients, or because nothing is clipped.

        decay: of the average of the weights, which follows each update; 0: there is no average.
        """
        self._optimizer, self._observe, self._update, self._clip_norm = optimizer, observe, optimizer.step, clip_norm
        self._decay = decay
        self._accept: Accept | None = None
        self._decision: StepDecision | None = None
        self._seen = (nan, nan)
        optimizer.step = self._step  # type: ignore[assignment,method-assign]

    def begin(self, accept: Accept) -> None:
        """Call before each step. Before the first call every update is applied, for DeepSpeed's setup."""
        self._accept, self._decision, self._seen = accept, None, (nan, nan)

    def result(self, loss: torch.Tensor) -> StepResult:
        """The result of the last step. If DeepSpeed itself rejected a non-finite gradient, it never called `step`.

        loss: one element; read only in that case, because reading it waits for the update.
        """
        apply, reason = self._decision or StepDecision(False, NOT_FINITE)
        seen, norm = self._seen if self._decision else (loss.item(), nan)
        return StepResult(seen, norm if norm >= 0 else nan, apply, reason)

    def _step(self) -> None:
        """DeepSpeed calls this once for each parameter group; the first call decides."""
        if self._accept is not None and self._decision is None:
            self._seen = self._observe()
            self._decision = self._accept(*self._seen)
            self._clip(self._seen[1])
        if self._decision is None or self._decision.apply:
            self._update()
            if self._decay and self._decision is not None:
                average.update(self._optimizer, self._decay)

    def _clip(self, norm: float) -> None:
        """Makes the fused update divide gradients by the excess of their norm, with DeepSpeed's epsilon."""
        excess = (norm + CLIP_EPSILON) / self._clip_norm if self._clip_norm else 0.0
        scale = None
        if excess > 1:
            device = self._optimizer.param_groups[0]["params"][0].device
            scale = torch.full((), excess, dtype=torch.float32, device=device)  # a copy of it would make the host wait
        self._optimizer.grad_scale = scale  # type: ignore[attr-defined]


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copies an array to the device in its own dtype, two bytes a token; asynchronously to an accelerator."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def weights_checksum(parameters: Iterable[torch.Tensor]) -> str:
    """A checksum of the tensors' bits, computed on their device; any single changed bit changes it."""
    kinds = {2: torch.int16, 4: torch.int32}
    sums = []
    for parameter in parameters:
        cuts = parameter.detach().view(kinds[parameter.element_size()]).flatten().split(CHECKSUM_ELEMENTS)
        sums.append(torch.stack([cut.sum(dtype=torch.int64) for cut in cuts]).sum())
    return hashlib.sha256(str(torch.stack(sums).tolist()).encode()).hexdigest()[:16]
