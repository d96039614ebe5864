"""Pipeline stages over DeepSpeed's PipelineModule, times data parallelism with ZeRO-1.

The layers are those of the whole model, under its names (contract 7): the model is laid out without memory, and a stage
gives memory to the layers that are its own.
"""

from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

from pipeline.checkpoint.fragments import FragmentReader, Tensors
from pipeline.config import TrainConfig
from pipeline.distributed import Ranks
from pipeline.model import objectives
from pipeline.model.gpt import build_model, initial_value
from pipeline.model.sampling import complete_halves_by
from pipeline.train.engine import float8, partitions
from pipeline.train.engine.base import (
    Accept,
    ConditionalStep,
    Engine,
    ForwardTimer,
    StepResult,
    accept_finite,
    weights_digest,
)
from pipeline.train.engine.deepspeed_config import deepspeed_config, new_optimizer, to_device

LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Of logits (B, T, V) and targets long (B, T)."""


class Start(nn.Module):
    """The embeddings: tokens long (B, T) to (B, T, D)."""

    def __init__(self, model: GPT2LMHeadModel, device: torch.device) -> None:
        super().__init__()
        self.wte, self.wpe, self.drop = model.transformer.wte, model.transformer.wpe, model.transformer.drop
        self.to_empty(device=device)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(inputs.shape[1], device=inputs.device)
        return self.drop(self.wte(inputs) + self.wpe(positions))


class Middle(nn.Module):
    """One block: (B, T, D) to (B, T, D)."""

    def __init__(self, model: GPT2LMHeadModel, device: torch.device, number: int, config: TrainConfig) -> None:
        super().__init__()
        self.block, self.recompute = model.transformer.h[number], config.parallel.recompute
        self.to_empty(device=device)
        if config.compile:
            self.block.compile()

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if self.recompute and self.training:
            return checkpoint(self.block, states, use_reentrant=False)
        return self.block(states)


class End(nn.Module):
    """The last norm and the head: (B, T, D) to logits (B, T, V)."""

    def __init__(self, model: GPT2LMHeadModel, device: torch.device) -> None:
        super().__init__()
        self.ln_f, self.lm_head = model.transformer.ln_f, model.lm_head
        self.to_empty(device=device)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.ln_f(states))


class StagesEngine(Engine):
    """A stage runs its blocks on one micro-batch of its data-parallel rank after the other."""

    def __init__(self, config: TrainConfig, model_config: GPT2Config, ranks: Ranks, initial: bool) -> None:
        self._config, self._model_config, self._ranks = config, model_config, ranks
        self._inputs_and_targets = objectives.inputs_and_targets(config.objective)
        self.data_ranks = config.parallel.data_ranks(ranks.count)
        with torch.device("meta"):
            self._model = build_model(model_config)
        if config.precision == "fp8":
            float8.convert(self._model.transformer.h, ranks.device)
        with redirect_stdout(StringIO()):  # DeepSpeed prints its layers and seeds
            module = PipelineModule(
                _layers(self._model, config, ranks.device),
                num_stages=config.parallel.pipeline_stages,
                loss_fn=self._mean_nats,
                partition_method=f"type:{Middle.__name__}",
            )
            if initial:
                self._initialize()
            optimizer = new_optimizer(config, self._own_parameters())
            self._conditional_step = ConditionalStep(optimizer, self._loss_and_norm)
            self._engine, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=deepspeed_config(config, ranks)
            )
        self.data_rank = self._engine.grid.get_data_parallel_id()
        self._timer = ForwardTimer(self._engine.module, ranks.device)
        self.work = f"stage {self._engine.stage_id}"
        self._place = partitions.Place(self.data_rank, self.data_ranks, parts={})

    def step(self, tokens: np.ndarray, rate: float, accept: Accept = accept_finite) -> StepResult:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        self._conditional_step.begin(accept)
        self._engine.set_train_batch_size(len(tokens) * self.data_ranks)
        loss = self._engine.train_batch(self._micro_batches(tokens))
        return self._conditional_step.result(float(loss))

    def evaluate(self, tokens: np.ndarray) -> np.ndarray:
        return self._evaluated(tokens, self._picture_nats, ()).double().cpu().numpy()

    def snapshot(self, earlier: Tensors | None = None) -> tuple[Tensors, list[dict[str, Any]]]:
        return partitions.snapshot(self._engine.optimizer, self._model, self._place, earlier)

    def restore(self, reader: FragmentReader, steps: int) -> None:
        partitions.restore(self._engine.optimizer, self._model, self._place, reader)
        self._engine.global_steps = steps
        self._engine.global_samples = self._config.batch.images_after(steps)

    def digests(self) -> dict[str, str]:
        return {self.work: weights_digest(parameter for _, parameter in self._own_parameters())}

    def complete(self, tokens: np.ndarray, samples: int, seed: int) -> np.ndarray:
        """No keys and values are kept: each colour costs a pass of whole pictures through all stages."""
        colors, positions = self._model_config.colors, self._model_config.n_positions

        def next_scores(so_far: torch.Tensor) -> torch.Tensor:
            known = so_far.shape[1] - 1
            pictures = np.zeros((len(so_far), positions), np.uint16)
            pictures[:, :known] = so_far[:, 1:].cpu().numpy()
            return self._evaluated(pictures, lambda logits, targets: logits[:, known, :colors].float(), (colors,))

        return complete_halves_by(
            next_scores, tokens, colors=colors, samples=samples, seed=seed, device=self._ranks.device
        )

    def _own_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Those of this stage's layers, under the whole model's names."""
        return [(name, parameter) for name, parameter in self._model.named_parameters() if not parameter.is_meta]

    def _initialize(self) -> None:
        with torch.no_grad():
            for name, parameter in self._own_parameters():
                parameter.copy_(initial_value(name, parameter.shape, self._model_config, self._config.seed))

    def _picture_nats(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return objectives.picture_loss(logits, targets, self._model_config.colors)

    def _mean_nats(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self._picture_nats(logits, targets).mean()

    def _loss_and_norm(self) -> tuple[float, float]:
        """All stages ask at the same time, after the last micro-batch."""
        return float(self._engine._aggregate_total_loss()), float(self._engine.optimizer._global_grad_norm)

    def _micro_batches(self, tokens: np.ndarray) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Inputs and targets, each long (micro_size, T); `tokens` must be a multiple of micro_size pictures."""
        for micro in to_device(tokens, self._ranks.device).split(self._config.batch.micro_size):
            yield self._inputs_and_targets(micro, self._model_config.colors)

    def _evaluated(self, tokens: np.ndarray, output: LossFunction, shape: tuple[int, ...]) -> torch.Tensor:
        """What `output` makes of logits and targets of tokens (B, T), fp32 (B, *shape), on every stage.

        The stages exchange micro-batches of one size, so the last is filled up with its last picture.
        """
        size = self._config.batch.micro_size
        count = -(-len(tokens) // size)
        padded = np.concatenate([tokens, np.repeat(tokens[-1:], count * size - len(tokens), axis=0)])
        engine, module = self._engine, self._engine.module
        module.loss_fn, engine.total_loss = output, None
        engine.reset_activation_shape()  # pictures here may be shorter than in training
        try:
            pieces = engine.eval_batch(
                self._micro_batches(padded), reduce_output=None, bcast_loss=False, num_micro_batches=count
            )
        finally:
            module.loss_fn = self._mean_nats
            engine.reset_activation_shape()
        result = torch.empty(count * size, *shape, device=self._ranks.device)
        if engine.is_last_stage():
            result.copy_(torch.cat(pieces))
        last = engine.grid.stage_to_global(engine.num_stages - 1)
        dist.broadcast(result, src=last, group=engine.grid.get_pipe_parallel_group())
        return result[: len(tokens)]


def _layers(model: GPT2LMHeadModel, config: TrainConfig, device: torch.device) -> list[LayerSpec]:
    blocks = [LayerSpec(Middle, model, device, number, config) for number in range(len(model.transformer.h))]
    return [LayerSpec(Start, model, device), *blocks, LayerSpec(End, model, device)]
