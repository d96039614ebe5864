"""Data parallelism over DeepSpeed's ZeRO, stages 0 to 3."""

from contextlib import nullcontext, redirect_stdout
from io import StringIO
from typing import Any

import deepspeed
import numpy as np
import torch
from torch import nn
from transformers import GPT2Config

from pipeline.checkpoint.fragments import FragmentReader, Tensors
from pipeline.config import TrainConfig
from pipeline.distributed import Ranks, mean_over_ranks
from pipeline.model import objectives
from pipeline.model.gpt import build_model, initial_value
from pipeline.model.sampling import complete_halves
from pipeline.train.engine import float8, partitions, tensor_parallel
from pipeline.train.engine.base import (
    Accept,
    ConditionalStep,
    Engine,
    ForwardTimer,
    StepResult,
    accept_finite,
    weights_digest,
)
from pipeline.train.engine.deepspeed_config import deepspeed_config, full_shape, new_optimizer, to_device


class ZeroEngine(Engine):
    """Every rank, or group of tensor-parallel ranks, runs the whole model on pictures of its own; ZeRO spreads what the
    stage says."""

    def __init__(self, config: TrainConfig, model_config: GPT2Config, ranks: Ranks, initial: bool) -> None:
        self.data_rank, self.data_ranks = (
            ranks.rank // config.parallel.tensor_parallel,
            config.parallel.data_ranks(ranks.count),
        )
        self._config, self._model_config, self._ranks = config, model_config, ranks
        self._inputs_and_targets = objectives.inputs_and_targets(config.objective)
        settings = deepspeed_config(config, ranks)
        model = _new_model(config, model_config, settings, ranks.device, initial)
        self._place = partitions.Place(self.data_rank, self.data_ranks, tensor_parallel.parts(model, config, ranks))
        if config.precision == "fp8":
            float8.convert(model.transformer.h, ranks.device)
        if config.parallel.recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
        if config.compile:
            for block in model.transformer.h:  # the whole model, compiled, would lose its causal attention kernel
                block.compile()
        if config.parallel.tensor_parallel > 1:
            tensor_parallel.prepare(model, config.parallel.tensor_parallel)
        optimizer = new_optimizer(config, model.named_parameters())
        self._conditional_step = ConditionalStep(optimizer, self._loss_and_norm)
        with redirect_stdout(StringIO()):  # DeepSpeed's bf16 optimizer prints memory tables
            self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        self._timer = ForwardTimer(self._engine.module, ranks.device)
        self.work = f"part {ranks.rank % config.parallel.tensor_parallel}"
        self._loss = torch.zeros(1, device=ranks.device)
        self._own_norm: float | None = None

    def step(self, tokens: np.ndarray, rate: float, accept: Accept = accept_finite) -> StepResult:
        self._engine.train()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        self._conditional_step.begin(accept)
        micro_batches = to_device(tokens, self._ranks.device).split(self._config.batch.micro_size)
        self._engine.set_train_batch_size(len(tokens) * self.data_ranks)
        self._engine.micro_steps = 0  # it finds the last micro-batch by dividing, and the batch may have grown
        total = torch.zeros(1, device=self._ranks.device)
        for micro in micro_batches:
            loss = self._picture_nats(micro).mean()
            self._engine.backward(loss)
            total += loss.detach()
            if self._engine.is_gradient_accumulation_boundary():
                self._loss = mean_over_ranks(total / len(micro_batches))  # read with the norm: one wait a step
                self._own_norm = self._clip() if self._config.parallel.zero_stage == 0 else None
            self._engine.step()
        return self._conditional_step.result(self._loss.item())

    def evaluate(self, tokens: np.ndarray) -> np.ndarray:
        self._engine.eval()
        size = self._config.batch.micro_size
        with torch.no_grad():
            pieces = [self._picture_nats(micro) for micro in to_device(tokens, self._ranks.device).split(size)]
        return torch.cat(pieces).double().cpu().numpy()

    def snapshot(self, earlier: Tensors | None = None) -> tuple[Tensors, list[dict[str, Any]]]:
        return partitions.snapshot(self._engine.optimizer, self._engine.module, self._place, earlier)

    def restore(self, reader: FragmentReader, steps: int) -> None:
        partitions.restore(self._engine.optimizer, self._engine.module, self._place, reader)
        self._engine.global_steps = steps
        self._engine.global_samples = self._config.batch.images_after(steps)

    def digests(self) -> dict[str, str]:
        if self._config.parallel.zero_stage == 3:
            return {}  # no two ranks hold the same
        held: dict[str, list[torch.Tensor]] = {"whole": []}
        for name, parameter in self._engine.module.named_parameters():
            held.setdefault(self.work if name in self._place.parts else "whole", []).append(parameter)
        return {name: weights_digest(parameters) for name, parameters in held.items()}

    def complete(self, tokens: np.ndarray, samples: int, seed: int) -> np.ndarray:
        self._engine.eval()
        return complete_halves(self._engine.module, tokens, samples=samples, seed=seed)

    def _picture_nats(self, tokens: torch.Tensor) -> torch.Tensor:
        """fp32 (B,): mean nats of each picture's predicted tokens; of integers (B, T) on the device."""
        colors = self._model_config.colors
        inputs, targets = self._inputs_and_targets(tokens, colors)
        logits = self._engine(input_ids=inputs).logits  # (B, T, V)
        return objectives.picture_loss(logits, targets, colors)

    def _loss_and_norm(self) -> tuple[float, float]:
        norm = self._engine.optimizer._global_grad_norm if self._own_norm is None else self._own_norm
        return self._loss.item(), float(norm)

    def _clip(self) -> float:
        """ZeRO-0 has no optimizer of DeepSpeed's that would measure and clip the gradient."""
        limit = self._config.optimizer.clip_norm or float("inf")
        return float(nn.utils.clip_grad_norm_(self._engine.module.parameters(), limit))


def _new_model(
    config: TrainConfig, model_config: GPT2Config, settings: dict[str, Any], device: torch.device, initial: bool
) -> nn.Module:
    """The model, with its initial weights if wanted; under ZeRO-3 it is born partitioned and filled parameter by
    parameter."""
    partitioned = config.parallel.zero_stage == 3
    with deepspeed.zero.Init(config_dict_or_path=settings) if partitioned else torch.device(device):
        model = build_model(model_config)
    for name, parameter in model.named_parameters() if initial else ():
        gathered = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0) if partitioned else nullcontext()
        with gathered, torch.no_grad():
            parameter.copy_(initial_value(name, full_shape(parameter), model_config, config.seed))
    return model
