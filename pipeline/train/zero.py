"""Data parallelism over DeepSpeed's ZeRO, stages 0 to 3."""

from contextlib import nullcontext, redirect_stdout
from io import StringIO
from typing import Any

import deepspeed
import numpy as np
import torch
from torch import nn
from transformers import GPT2Config

from pipeline.config import TrainConfig
from pipeline.model import objectives
from pipeline.model.gpt import build_model, initial_value
from pipeline.model.sampling import complete_halves
from pipeline.train import fragments
from pipeline.train.engine import Engine, StepResult, deepspeed_config, full_shape, new_optimizer, to_device
from pipeline.train.ranks import Ranks, mean_over_ranks


class ZeroEngine(Engine):
    """Every rank runs the whole model on its own pictures; ZeRO spreads what the stage says."""

    def __init__(self, config: TrainConfig, model_config: GPT2Config, ranks: Ranks) -> None:
        self.data_rank, self.data_ranks = ranks.rank, ranks.count
        self._config, self._model_config, self._ranks = config, model_config, ranks
        self._accumulation = config.accumulation_steps(ranks.count)
        settings = deepspeed_config(config, ranks)
        model = _initialized_model(config, model_config, settings, ranks.device)
        if config.parallel.recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
        if config.compile:
            for block in model.transformer.h:  # the whole model, compiled, would lose its causal attention kernel
                block.compile()
        optimizer = new_optimizer(config, model.named_parameters(), ranks.device)
        with redirect_stdout(StringIO()):  # DeepSpeed's bf16 optimizer prints memory tables
            self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

    def step(self, tokens: np.ndarray, rate: float) -> StepResult:
        self._engine.train()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros(1, device=self._ranks.device)
        own_norm = None
        for micro in np.split(tokens, self._accumulation):
            loss = self._token_nats(micro).mean()
            self._engine.backward(loss)
            total += loss.detach()
            if self._engine.is_gradient_accumulation_boundary() and self._config.parallel.zero_stage == 0:
                own_norm = self._clip()
            self._engine.step()
        mean = mean_over_ranks(total / self._accumulation).item()
        norm = self._engine.get_global_grad_norm() if own_norm is None else own_norm
        return StepResult(loss=mean, grad_norm=float(norm), applied=self._engine.was_step_applied())

    def evaluate(self, tokens: np.ndarray) -> np.ndarray:
        self._engine.eval()
        size = self._config.batch.micro_size
        with torch.no_grad():
            pieces = [self._token_nats(tokens[at : at + size]).mean(1) for at in range(0, len(tokens), size)]
        return torch.cat(pieces).double().cpu().numpy()

    def snapshot(self) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        return fragments.snapshot(
            fragments.partitions_of(self._engine.optimizer, self._engine.module, self.data_rank, self.data_ranks)
        )

    def restore(self, reader: fragments.FragmentReader, steps: int) -> None:
        fragments.restore(self._engine.optimizer, self._engine.module, self.data_rank, self.data_ranks, reader)
        self._engine.global_steps = steps
        self._engine.global_samples = steps * self._config.batch.global_size
        self._engine.micro_steps = steps * self._accumulation

    def complete(self, tokens: np.ndarray, samples: int, seed: int) -> np.ndarray:
        self._engine.eval()
        return complete_halves(self._engine.module, tokens, samples=samples, seed=seed)

    def _token_nats(self, tokens: np.ndarray) -> torch.Tensor:
        """fp32 (B, T): nats of each token given those before it."""
        colors = self._model_config.colors
        inputs, targets = objectives.next_color(to_device(tokens, self._ranks.device), colors)
        logits = self._engine(input_ids=inputs).logits  # (B, T, V)
        return objectives.per_token_loss(logits, targets, colors)

    def _clip(self) -> float:
        """ZeRO-0 has no optimizer of DeepSpeed's that would measure and clip the gradient."""
        limit = self._config.optimizer.clip_norm or float("inf")
        return float(nn.utils.clip_grad_norm_(self._engine.module.parameters(), limit))


def _initialized_model(
    config: TrainConfig, model_config: GPT2Config, settings: dict[str, Any], device: torch.device
) -> nn.Module:
    """The model with its initial weights; under ZeRO-3 it is born partitioned and filled parameter by parameter."""
    partitioned = config.parallel.zero_stage == 3
    with deepspeed.zero.Init(config_dict_or_path=settings) if partitioned else torch.device(device):
        model = build_model(model_config)
    for name, parameter in model.named_parameters():
        gathered = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0) if partitioned else nullcontext()
        with gathered, torch.no_grad():
            parameter.copy_(initial_value(name, full_shape(parameter), model_config, config.seed))
    return model
