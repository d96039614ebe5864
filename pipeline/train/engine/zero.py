"""Data parallelism over DeepSpeed's ZeRO stages 0 to 3, with or without tensor parallelism."""

from typing import Any

import deepspeed
import numpy as np
import torch
from torch import nn
from transformers import GPT2Config

from pipeline.checkpoint.fragments import EMA, Part
from pipeline.config import TrainConfig
from pipeline.distributed import Ranks, mean_over_ranks
from pipeline.model.decoding import Decoder
from pipeline.model.gpt import build_model, initial_value
from pipeline.model.masks import Batch
from pipeline.model.recompute import recompute_blocks
from pipeline.model.sampling import complete_halves_by
from pipeline.train.engine import compilation, float8, tensor_parallel
from pipeline.train.engine import deepspeed_internals as internals
from pipeline.train.engine.base import Check, checked, unchecked
from pipeline.train.engine.deepspeed_config import deepspeed_config
from pipeline.train.engine.deepspeed_engine import DeepSpeedEngine, weights_checksum
from pipeline.train.engine.initial_weights import initialize_parts
from pipeline.train.engine.tensor_group import TensorGroup

REPLICATED = "replicated"
"""Replica name of the weights that all ranks hold."""


class ZeroEngine(DeepSpeedEngine):
    """Every rank, or group of tensor-parallel ranks, runs the complete model on its own images; the ZeRO stage
    determines which part of the model's state is partitioned."""

    def __init__(self, config: TrainConfig, model_config: GPT2Config, ranks: Ranks, initial: bool) -> None:
        super().__init__(config, model_config, ranks)
        parallel, settings = config.parallel, deepspeed_config(config, ranks)
        grid = tensor_parallel.grid_of(config, ranks) if self._tensor else None
        self.data_rank = grid.get_data_parallel_rank() if grid else ranks.rank
        self.work = f"part {self._tensor.rank if self._tensor else 0}"
        if self._tensor:
            model = _new_part(model_config, self._tensor, ranks.device)
        else:
            model = _new_model(model_config, settings, ranks.device, parallel.zero_stage == 3)
        parts = tensor_parallel.parts_of(model, config.model.block, self._tensor)
        if initial:
            _initialize(model, config, model_config, parts)
        self._coordinates = internals.RankCoordinates(self.data_rank, self.data_ranks, parts)
        if config.precision == "fp8":
            float8.convert(model.transformer.h, ranks.device)
        model.forward = compilation.trunk(model, config, ranks.device)
        if parallel.recompute:
            recompute_blocks(model.transformer.h)
        self._start(model, list(model.named_parameters()), settings, grid)
        self._model = self._engine.module
        self._loss = torch.zeros(1, device=ranks.device)
        self._own_norm: torch.Tensor | None = None
        self._start_average()

    def evaluate(self, batch: Batch) -> np.ndarray:
        self._engine.eval()
        with torch.no_grad(), compilation.eagerly(), self._divided(batch.tokens.shape[1]):
            nats = [self._forward(inputs, targets) for inputs, targets in self._micro_batches(batch)]
        return torch.cat(nats).double().cpu().numpy()

    def complete(self, tokens: np.ndarray, samples: int, seed: int, check: Check = unchecked) -> np.ndarray:
        self._engine.eval()
        parallel, colors, device = self._config.parallel, self._model_config.colors, self._ranks.device
        owns_weights = parallel.zero_stage < 3 and parallel.tensor_parallel == 1
        with torch.no_grad(), compilation.eagerly(), self._divided(None):
            decoder = Decoder(self._model, tokens.shape[1], use_graph=owns_weights)
            next_scores = checked(decoder, check)
            return complete_halves_by(next_scores, tokens, colors=colors, samples=samples, seed=seed, device=device)

    def replica_checksums(self) -> dict[str, str]:
        if self._config.parallel.zero_stage == 3:
            return {}  # no weights are replicated
        held: dict[str, list[torch.Tensor]] = {REPLICATED: []}
        for name, parameter in self._model.named_parameters():
            held.setdefault(self.work if name in self._coordinates.parts else REPLICATED, []).append(parameter)
        if self._config.parallel.zero_stage == 0 and self._config.ema.decay:
            state = (self._engine.optimizer, self._model, self._coordinates)
            held[f"average, {self.work}"] = [one.flat(EMA) for one in internals.partitions_of(*state)]
        return {name: weights_checksum(parameters) for name, parameters in held.items()}

    def _train(self, batch: Batch) -> torch.Tensor:
        self._engine.train()
        internals.restart_accumulation(self._engine)
        count = len(batch) // self._config.batch.micro_size
        total = torch.zeros(1, device=self._ranks.device)
        for inputs, targets in self._micro_batches(batch):
            loss = self._forward(inputs, targets).mean()
            self._engine.backward(loss)
            total += loss.detach()
            if self._engine.is_gradient_accumulation_boundary():
                self._loss = mean_over_ranks(total / count)  # read with the norm: one synchronization a step
                self._own_norm = self._clip() if self._config.parallel.zero_stage == 0 else None
            self._engine.step()
        return self._loss

    def _forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """fp32 (B,): mean nats of each image's predicted tokens."""
        return self._image_nats(self._engine(inputs), targets)

    def _loss_and_norm(self) -> tuple[float, float]:
        norm = internals.gradient_norm(self._engine) if self._own_norm is None else self._own_norm
        loss, norm = torch.stack([self._loss.squeeze(), norm.to(self._loss)]).tolist()  # both in one wait
        return loss, norm

    def _clip(self) -> torch.Tensor:
        """Clips the gradient and returns its norm (): ZeRO-0 has no DeepSpeed optimizer that does."""
        limit = self._config.optimizer.clip_norm or float("inf")
        return nn.utils.clip_grad_norm_(self._model.parameters(), limit)


def _new_model(
    model_config: GPT2Config, settings: dict[str, Any], device: torch.device, partitioned: bool
) -> nn.Module:
    """The complete model, or partitioned as it is built (ZeRO-3); its weights are uninitialized."""
    with deepspeed.zero.Init(config_dict_or_path=settings) if partitioned else torch.device(device):
        return build_model(model_config)


def _new_part(model_config: GPT2Config, group: TensorGroup, device: torch.device) -> nn.Module:
    """A tensor-parallel rank's part of the model, without memory for the other parts; its weights are uninitialized."""
    with torch.device("meta"):
        model = build_model(model_config)
    tensor_parallel.split(model, group)
    return model.to_empty(device=device)


def _initialize(model: nn.Module, config: TrainConfig, model_config: GPT2Config, parts: dict[str, Part]) -> None:
    """Initializes the weights; under ZeRO-3, parameter by parameter."""
    if config.parallel.zero_stage < 3:
        initialize_parts(model, model_config, config.seed, parts)
        return
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            parameter.copy_(initial_value(name, internals.full_shape(parameter), model_config, config.seed))
